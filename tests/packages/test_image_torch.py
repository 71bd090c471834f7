"""Which torch an image gets, and that its build says so: the Dockerfiles' script with the real uv, which only plans."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAN = ["--dry-run", "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
WHEELS = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", "")


def build(flavour: str, cpu_wheels: str, found: str = "") -> subprocess.CompletedProcess[str]:
    """Plan the step of a Dockerfile; `found` is the machine's own wheel folder, if any."""
    environment = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "PIP_FIND_LINKS")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    environment |= {"UV_SYSTEM_CERTS": "1", **({"UV_FIND_LINKS": found} if found else {})}
    command = ["sh", "requirements/torch.sh", flavour, cpu_wheels, "--reinstall", *PLAN]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_a_place_without_the_wheel_ends_the_build_instead_of_something_larger(tmp_path: Path) -> None:
    done = build("cpu", str(tmp_path))
    assert done.returncode != 0
    assert f"CPU_WHEELS={tmp_path} does not hold the torch" in done.stderr
    assert "torch:" not in done.stdout


@pytest.mark.packages
@pytest.mark.parametrize(("flavour", "warned"), [("cpu", True), ("gpu", False)])
def test_the_build_with_cuda_is_never_taken_silently(flavour: str, warned: bool, tmp_path: Path) -> None:
    done = build(flavour, "", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch: the build on PyPI, ")
    assert "nvidia-cublas" in done.stderr, "what uv would install"
    assert ("WARNING: CPU_WHEELS names no place" in done.stderr) == warned
    assert ("though the flavour is cpu" in done.stdout) == warned


@pytest.mark.skipif(not WHEELS, reason="no wheel folder here holds the CPU-only torch")
@pytest.mark.parametrize("named", [True, False])
def test_the_small_build_is_taken_where_it_is(named: bool) -> None:
    done = build("cpu", WHEELS if named else "", "" if named else WHEELS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch: the CPU-only build\n"
    assert "nvidia-" not in done.stderr and "WARNING" not in done.stderr


def test_compose_passes_the_place_on_to_every_image_with_torch() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for stage in ("trainer", "merger", "inference"):
        assert services[stage]["build"]["args"]["CPU_WHEELS"] == "${LORALINE_CPU_WHEELS:-}"
        text = (ROOT / "services" / stage / "Dockerfile").read_text()
        assert "ARG CPU_WHEELS=\n" in text and "requirements/torch.sh" in text
