"""`loraline version`: what is installed here, and with --all what a result may depend on."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraline.client.cli import main as command

# As nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader,nounits writes it.
TWO_GPUS = "NVIDIA H100 80GB HBM3, 570.86.15, 81559\\nNVIDIA L4, 570.86.15, 23034"


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(command.build(), list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def everything() -> dict[str, Any]:
    return json.loads(invoke("version", "--all", "--format", "json"))


def test_ours_alone() -> None:
    told = json.loads(invoke("version", "--format", "json"))
    assert told["loraline-client"] == version_of("loraline-client")
    assert all(name.startswith("loraline-") for name in told)


def test_all_tells_python_engines_and_every_package() -> None:
    told = everything()
    assert told["system"]["python"] == f"CPython {platform.python_version()}"
    assert told["packages"]["grpcio"] == version_of("grpcio")
    for engine, version in told["engines"].items():
        assert version == version_of(engine)
    text = invoke("version", "--all")
    assert "system:" in text and "nvidia driver" in text
    assert any(line.split() == ["grpcio", version_of("grpcio")] for line in text.splitlines())


def test_gpus_and_their_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{TWO_GPUS}\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    system = everything()["system"]
    assert system["gpu 0"] == "NVIDIA H100 80GB HBM3, 81559 MiB"
    assert system["gpu 1"] == "NVIDIA L4, 23034 MiB"
    assert system["nvidia driver"] == "570.86.15"


def test_a_driver_that_fails_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert everything()["system"]["gpu"] == "none found"
