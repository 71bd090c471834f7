"""Names and shapes in safetensors files, read from their headers without loading a tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from loraline.core.errors import data_loss

_MAX_HEADER = 100 * 1024 * 1024


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape. DATA_LOSS WEIGHTS_MALFORMED when the file is no safetensors file."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > _MAX_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(size))
        return {
            str(name): tuple(int(extent) for extent in entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        message = f"{file.name} is no readable safetensors file: {error}. Train or publish it again."
        raise data_loss("WEIGHTS_MALFORMED", message, file=file.name) from error


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the same for every safetensors file of a folder together."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(shapes(file))
    return found
