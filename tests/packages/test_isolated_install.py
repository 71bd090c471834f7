"""Each package alone in a fresh environment: it installs, imports, starts, and drags nothing heavy in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraline.core.serving.addresses import free_port

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("datagen", "trainer", "merger", "inference")
HEAVY = ("torch", "transformers", "vllm", "peft", "trl", "datasets", "pandas")
# Names and greatest size in MB (site-packages as installed, no bytecode). The bounds are 1.2 to 2 times what was seen,
# so that a new dependency of weight does not slip in.
BOUND_MB = {
    "api": 60,
    "core": 130,
    "client": 90,
    "datagen": 380,
    "trainer": 130,
    "merger": 130,
    "inference": 140,
    "allinone": 400,
}

pytestmark = [pytest.mark.packages, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Environment:
    """A virtual environment with one package of ours and what it asks for."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def run(self, code: str) -> str:
        done = subprocess.run([self.python, "-I", "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def distributions(self) -> list[str]:
        code = "import importlib.metadata as m, json; print(json.dumps(sorted(d.name for d in m.distributions())))"
        return json.loads(self.run(code))

    def size_mb(self) -> float:
        files = (f for f in self.folder.rglob("*") if f.is_file() and not f.is_symlink() and f.suffix != ".pyc")
        return sum(f.stat().st_size for f in files) / 1e6


def _uv(*arguments: str, folder: Path) -> None:
    uv = Path(sys.executable).parent / "uv"
    command = [str(uv) if uv.exists() else "uv", *arguments]
    environment = {**os.environ, "VIRTUAL_ENV": str(folder), "UV_LINK_MODE": "copy", "UV_SYSTEM_CERTS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr


def _install(folder: Path, *packages: str) -> Environment:
    _uv("venv", "--quiet", "--python", sys.executable, str(folder), folder=folder)
    # The versions that were locked and hashed; what the package asks for beyond them would be resolved and seen here.
    _uv("pip", "install", "--quiet", "-c", "requirements/all.txt", *packages, folder=folder)
    return Environment(folder)


LOCAL = {
    "api": ["./packages/api"],
    "core": ["./packages/api", "./packages/core"],
    "client": ["./packages/api", "./packages/client"],
    **{
        s: ["./packages/api", "./packages/core", f"./services/{s}"]
        for s in ("datagen", "trainer", "merger", "inference")
    },
    # What `pip install loraline` would bring: every stage and the command, without the engines.
    "allinone": [
        "./packages/api",
        "./packages/core",
        "./packages/client",
        *[f"./services/{s}" for s in ("datagen", "trainer", "merger", "inference")],
        "./packages/allinone",
    ],
}


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Environment]:
    return {}


@pytest.fixture
def environment(
    request: pytest.FixtureRequest, environments: dict[str, Environment], tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    name = request.param
    if name not in environments:
        environments[name] = _install(tmp_path_factory.mktemp(name) / "venv", *LOCAL[name])
    return environments[name]


@pytest.mark.parametrize(("environment", "name"), [(n, n) for n in LOCAL], indirect=["environment"])
def test_installs_alone_and_stays_light(environment: Environment, name: str) -> None:
    found = environment.distributions()
    size = environment.size_mb()
    print(f"\npackage {name}: {len(found)} distributions, {size:.0f} MB")
    assert not [d for d in found if d.lower() in HEAVY], found
    assert size <= BOUND_MB[name], f"{name} grew to {size:.0f} MB; is the new dependency worth it?"
    environment.run(f"import loraline.{name if name != 'api' else 'api.job.v1.job_pb2'}")


@contextmanager
def _service(environment: Environment, stage: str, data: Path) -> Iterator[int]:
    port = free_port()
    settings = {
        "LORALINE_DATA_DIR": str(data),
        "LORALINE_LISTEN": f"127.0.0.1:{port}",
        "LORALINE_METRICS_LISTEN": "",
        "LORALINE_INFERENCE_HTTP_LISTEN": f"127.0.0.1:{free_port()}",
    }
    log = (data.parent / f"{stage}.log").open("w")
    process = subprocess.Popen(
        [environment.python, "-m", f"loraline.{stage}"],
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **settings},
        stdout=log, stderr=subprocess.STDOUT, cwd=data.parent,
    )  # fmt: skip
    try:
        yield port
    finally:
        process.terminate()
        code = process.wait(timeout=30)
        log.close()
        assert code == 0, (data.parent / f"{stage}.log").read_text()


def _health(environment: Environment, port: int, service: str) -> str:
    os_environment = {**os.environ, "LORALINE_LISTEN": f"127.0.0.1:{port}"}
    done = subprocess.run(
        [environment.python, "-m", "loraline.core.serving.healthcheck", service],
        capture_output=True, text=True, timeout=60, env=os_environment, cwd=environment.folder,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize(("environment", "stage"), [(stage, stage) for stage in STAGES], indirect=["environment"])
def test_stage_starts_alone(environment: Environment, stage: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with _service(environment, stage, data) as port:
        # Alive means that the jobs' API answers; an inference without an engine is alive and says that it is not ready.
        deadline, status = time.monotonic() + 60, ""
        while time.monotonic() < deadline and status != "SERVING":
            status = _health(environment, port, "loraline.api.job.v1.JobService")
        log = (tmp_path / f"{stage}.log").read_text()
        assert status == "SERVING", f"{status}\n{log}"


@pytest.mark.parametrize("environment", ["client"], indirect=True)
def test_client_command_explains_itself(environment: Environment) -> None:
    command = environment.folder / "bin" / "loraline"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout
