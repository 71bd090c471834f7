"""The CUDA runtime that torch was built for is looked for before the engine is built, as the loader would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from google._upb import _message

from loraline.inference.config import InferenceSettings
from loraline.inference.preflight import engine, gpu

LIBRARY = Path(str(_message.__file__))
"""Any shared library that loads here stands for CUDA's, which this machine need not have."""


@pytest.mark.parametrize(
    ("built", "place"),
    [
        ((12, 8), "nvidia/cuda_runtime/lib/libcudart.so.12"),
        ((13, 0), "nvidia/cu13/lib/libcudart.so.13"),
        ((11, 8), "torch/lib/libcudart-d0da41ae.so.11.0"),
    ],
)
def test_the_one_that_torch_brings_is_loaded(tmp_path: Path, built: tuple[int, int], place: str) -> None:
    library = tmp_path / place
    library.parent.mkdir(parents=True)
    shutil.copy(LIBRARY, library)
    found = gpu.cuda_library(built, tmp_path)
    assert (found.level, found.said) == ("ok", f"{library} is there")


def test_one_of_another_version_does_not_do(tmp_path: Path) -> None:
    library = tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12"
    library.parent.mkdir(parents=True)
    shutil.copy(LIBRARY, library)
    found = gpu.cuda_library((99, 1), tmp_path)
    assert (found.level, found.reason) == ("failed", "CUDA_LIBRARY_MISSING")
    assert "torch is built for CUDA 99.1: libcudart.so.99: cannot open shared object file" in found.said


def test_the_systems_is_found_by_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(LIBRARY, tmp_path / "libcudart.so.99")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert gpu.cuda_library((99, 1), tmp_path / "packages").said == "libcudart.so.99 is there"
    (tmp_path / "libcudart.so.99").write_bytes(b"cut")
    assert "file too short" in gpu.cuda_library((99, 1), tmp_path / "packages").said


def test_it_is_looked_for_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    monkeypatch.setattr(engine, "check_gpus", lambda share, needed: iter(()))
    monkeypatch.setattr(engine, "cuda_of_torch", lambda: (99, 1))
    reasons = [finding.reason for finding in engine.check_engine(InferenceSettings())]
    assert "CUDA_LIBRARY_MISSING" in reasons
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    assert "CUDA_LIBRARY_MISSING" not in [finding.reason for finding in engine.check_engine(InferenceSettings())]
