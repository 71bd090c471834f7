"""Sizes of model folders, read without loading them."""

from __future__ import annotations

from pathlib import Path


def weight_bytes(folder: Path) -> int:
    """Return the size of a model folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
