"""Sizes of model folders, read without loading them."""

from __future__ import annotations

from pathlib import Path

_FLOAT32_BYTES = 4 * 1024**3


def weight_bytes(folder: Path) -> int:
    """Return the size of a model folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def float32_on_cpu(folder: Path) -> bool:
    """Tell whether a model is small enough to be computed in float32 on a CPU: the proof at load is then exact."""
    return weight_bytes(folder) <= _FLOAT32_BYTES
