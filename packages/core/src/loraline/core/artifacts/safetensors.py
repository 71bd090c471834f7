"""The header of safetensors files: names, types and shapes, read without loading a tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100 * 1024 * 1024


def read_header(file: Path) -> dict[str, Any]:
    """Return tensor name -> {dtype, shape, data_offsets}. ValueError when the file is cut or no safetensors file."""
    with file.open("rb") as stream:
        start = stream.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise ValueError("it is too short")
        (size,) = _LENGTH.unpack(start)
        if size > _MAX_HEADER:
            raise ValueError("its header is too long")
        header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    try:
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("its header does not say where the tensors lie") from error
    length = file.stat().st_size
    if length < _LENGTH.size + size + end:
        raise ValueError(f"it has {length} bytes where its header promises {_LENGTH.size + size + end}")
    return header
