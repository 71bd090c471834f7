"""Names and shapes in safetensors files, read from their headers without loading a tensor."""

from __future__ import annotations

from pathlib import Path

from loraline.core.artifacts.safetensors import read_header
from loraline.core.errors import data_loss


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape. DATA_LOSS WEIGHTS_MALFORMED when the file is no safetensors file."""
    try:
        header = read_header(file)
        return {str(name): tuple(int(extent) for extent in entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{file.name} is no readable safetensors file: {error}. Train or publish it again."
        raise data_loss("WEIGHTS_MALFORMED", message, file=file.name) from error


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the same for every safetensors file of a folder together."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(shapes(file))
    return found
