"""Builds the wheels of all packages and checks them in a clean environment: `make release`.

Usage: tools/release.py [--dirty] [FOLDER]. Into FOLDER (dist/) go wheels/, sbom/ and SHA256SUMS. What is checked: one
version everywhere; nothing uncommitted (unless --dirty); every file of the source is in its wheel, and nothing else;
the wheels alone, with the pinned versions of what they ask for, install into an environment that never saw this source
tree, fit together, explain themselves, and serve.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "packages/api",
    "packages/core",
    "packages/client",
    "packages/allinone",
    "services/datagen",
    "services/trainer",
    "services/merger",
    "services/inference",
)
START_SECONDS = 90


class ReleaseRefused(Exception):
    """Something about the wheels is wrong; the text says what."""


def uv(*arguments: str | Path, **environment: str) -> str:
    """Run uv and return what it wrote; ReleaseRefused with its complaint when it fails."""
    beside = Path(sys.executable).with_name("uv")
    command = [str(beside if beside.exists() else "uv"), *map(str, arguments)]
    given = {**os.environ, "UV_SYSTEM_CERTS": os.environ.get("UV_SYSTEM_CERTS", "1"), **environment}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseRefused(f"uv {' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def git(*arguments: str) -> str:
    """Run git and return what it wrote."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check_committed() -> None:
    """Refuse a release of what nobody else has."""
    changed = git("status", "--porcelain", "--", "packages", "services", "requirements", "proto").splitlines()
    if changed:
        raise ReleaseRefused(
            f"{len(changed)} files are not committed, such as {changed[0][3:]}; commit, or say --dirty"
        )


def one_version() -> str:
    """Return the version that all packages have; ReleaseRefused when they differ."""
    projects = [tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"] for package in PACKAGES]
    versions = {project["name"]: project["version"] for project in projects}
    if len(set(versions.values())) != 1:
        raise ReleaseRefused(f"the packages have different versions: {versions}")
    version = next(iter(versions.values()))
    for project in projects:
        for wanted in project["dependencies"]:
            if wanted.startswith("loraline-") and not wanted.endswith(f"=={version}"):
                raise ReleaseRefused(f"{project['name']} asks for {wanted}, not for version {version}")
    return version


def build(wheels: Path) -> list[Path]:
    """Build all wheels into a folder and return them."""
    shutil.rmtree(wheels, ignore_errors=True)
    for package in PACKAGES:
        uv("build", "--quiet", "--wheel", "--build-constraints", "requirements/build.txt", "--out-dir", wheels, package)
    return sorted(wheels.glob("*.whl"))


def check_content(wheel: Path, package: str) -> None:
    """Compare a wheel with the files of its source; ReleaseRefused names the first that differ."""
    listing = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", f"{package}/src")
    wanted = {name.removeprefix(f"{package}/src/") for name in listing.split("\0") if name}
    with zipfile.ZipFile(wheel) as content:
        held = {name for name in content.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    if wanted != held:
        missing, extra = sorted(wanted - held)[:3], sorted(held - wanted)[:3]
        raise ReleaseRefused(f"{wheel.name}: missing {missing}, not of the source {extra}")


def install(folder: Path, wheels: list[Path]) -> Path:
    """Install the wheels with pinned dependencies into a fresh environment and return its folder of programs."""
    environment = folder / "venv"
    uv("venv", "--quiet", "--python", sys.executable, environment)
    constraints = ("-c", "requirements/all.txt")
    uv("pip", "install", "--quiet", *constraints, *wheels, VIRTUAL_ENV=str(environment))
    uv("pip", "check", VIRTUAL_ENV=str(environment))
    return environment / "bin"


def run_in(folder: Path, *command: str | Path, **environment: str) -> str:
    """Run a program outside of the source tree and return what it wrote; ReleaseRefused when it fails."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ReleaseRefused(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_serving(folder: Path, programs: Path) -> None:
    """Start the server of the wheels and ask it how it is; ReleaseRefused when it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {"LORALINE_LISTEN": address, "LORALINE_METRICS_LISTEN": "", "LORALINE_DATA_DIR": str(folder / "data")}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    log = folder / "server.log"
    with log.open("wb") as output:
        command = [programs / "loraline", "up", "--stage", "datagen", "--stage", "trainer", "--stage", "merger"]
        server = subprocess.Popen(command, cwd=folder, env=clean | settings, stdout=output, stderr=subprocess.STDOUT)
    try:
        _await_health(folder, programs, server, settings)
        server.send_signal(signal.SIGTERM)
        if server.wait(60):
            raise ReleaseRefused(f"the server ended badly:\n{log.read_text()}")
    finally:
        if server.poll() is None:
            server.kill()


def _await_health(folder: Path, programs: Path, server: subprocess.Popen[bytes], settings: dict[str, str]) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            run_in(folder, programs / "python", "-m", "loraline.core.serving.healthcheck", **settings)
        except ReleaseRefused as refused:
            if server.poll() is not None or time.monotonic() > give_up:
                raise ReleaseRefused(f"{refused}\n{(folder / 'server.log').read_text()}") from None
            time.sleep(0.2)
        else:
            return


def check_installed(version: str, wheels: list[Path]) -> None:
    """Install the wheels somewhere else and use them."""
    with tempfile.TemporaryDirectory(prefix="loraline-release-") as place:
        folder = Path(place)
        programs = install(folder, wheels)
        told = run_in(folder, programs / "loraline", "version")
        if told.count(version) != len(PACKAGES):
            raise ReleaseRefused(f"`loraline version` tells not {len(PACKAGES)} packages of {version}:\n{told}")
        where = run_in(folder, programs / "python", "-c", "import loraline.core.errors as m; print(m.__file__)")
        if not where.startswith(str(folder)):
            raise ReleaseRefused(f"the environment is not clean: loraline.core comes from {where}")
        check_serving(folder, programs)


def write_sums(folder: Path) -> None:
    """Write the digests of everything in the folder, as sha256sum reads them."""
    files = sorted(file for file in folder.glob("*/*") if file.is_file() and not file.name.startswith("."))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main(folder: Path, *, dirty: bool) -> int:
    """Build and check, and return the exit code."""
    try:
        if not dirty:
            check_committed()
        version = one_version()
        wheels = build(folder / "wheels")
        print(f"built {len(wheels)} wheels of {version}; checking them in a clean environment")
        by_name = {wheel.name.partition("-")[0]: wheel for wheel in wheels}
        for package in PACKAGES:
            check_content(by_name[f"loraline_{Path(package).name}"], package)
        check_installed(version, wheels)
        subprocess.run([sys.executable, ROOT / "tools" / "sbom.py", folder / "sbom"], check=True)
    except ReleaseRefused as refused:
        print(f"no release: {refused}", file=sys.stderr)
        return 1
    write_sums(folder)
    print(f"{folder}: wheels/, sbom/ and SHA256SUMS of {version}")
    return 0


if __name__ == "__main__":
    places = [argument for argument in sys.argv[1:] if argument != "--dirty"]
    sys.exit(main(Path(places[0]).resolve() if places else ROOT / "dist", dirty="--dirty" in sys.argv))
