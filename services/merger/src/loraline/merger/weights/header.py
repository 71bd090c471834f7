"""The header of one safetensors file: names, types, shapes and offsets, with no weights read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loraline.core.errors import data_loss

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element by the format's own type name."""

MOST_HEADER_BYTES = 32 * 1024 * 1024
"""Room for 200000 tensors in one file; the format allows three times that, which takes gigabytes to read."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that a merge may add to or convert."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it; `start` and `end` count from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


def plain_weights(tensors: Iterable[TensorInfo]) -> bool:
    """Whether all tensors are plain floats, so that a quantization_config beside them is left over."""
    return all(tensor.dtype in FLOAT_DTYPES for tensor in tensors)


@dataclass(frozen=True)
class ShardHeader:
    """A validated header. `tensors` are in the order of their bytes; `data_start` is the offset of the first byte."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    data_start: int

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return self.tensors[-1].end if self.tensors else 0


@dataclass(frozen=True)
class Form:
    """How written weights differ from the base's in form; values are another matter.

    A merge changes form only for an asked type (`dtypes`), a grown vocabulary (`shapes`) and an output embedding that
    is no longer the input's (`added`, written at the end of the last shard).
    """

    dtypes: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> shape; the type is that of the first tensor of the last shard, after `dtypes`."""

    def of(self, tensor: TensorInfo) -> tuple[str, tuple[int, ...]]:
        """Return a base tensor's new type and shape."""
        return self.dtypes.get(tensor.name, tensor.dtype), self.shapes.get(tensor.name, tensor.shape)

    def keeps(self, tensor: TensorInfo) -> bool:
        """Whether the tensor's bytes may be copied as they are."""
        return self.of(tensor) == (tensor.dtype, tensor.shape)


def read_header(path: Path) -> ShardHeader:
    """Read and validate the header of `path`.

    The safetensors library checks that offsets are contiguous and that the file is exactly as long as its header says,
    which finds truncation; what it refuses is DATA_LOSS with reason CORRUPT_WEIGHTS, the file and the library's words.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes, more than {MOST_HEADER_BYTES}")
            raw = json.loads(file.read(length))
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise corrupt_weights(path, str(error)) from error
    metadata = raw.pop("__metadata__", None)
    tensors = [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in raw.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    return ShardHeader(path, tuple(tensors), metadata, 8 + length)


def encode_header(header: ShardHeader, form: Form, *, last: bool = False) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Return the bytes that begin the written shard, and where its tensors lie; `last` takes the added tensors in.

    Without a change of form these are the base's own header bytes, so that an untouched shard stays byte-identical.
    The order of the tensors stays.
    """
    added = form.added if last else {}
    if not added and all(form.keeps(tensor) for tensor in header.tensors):
        with header.path.open("rb") as file:
            return file.read(header.data_start), header.tensors
    wanted = [(tensor.name, *form.of(tensor)) for tensor in header.tensors]
    wanted += [(name, wanted[0][1] if wanted else "F32", shape) for name, shape in added.items()]
    placed: list[TensorInfo] = []
    offset = 0
    for name, dtype, shape in wanted:
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        placed.append(TensorInfo(name, dtype, shape, offset, offset + size))
        offset += size
    entries: dict[str, object] = {"__metadata__": header.metadata} if header.metadata else {}
    for tensor in placed:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    return len(text).to_bytes(8, "little") + text, tuple(placed)


def corrupt_weights(path: Path, reason: str) -> Exception:
    """DATA_LOSS for a weights file that cannot be trusted."""
    return data_loss(
        "CORRUPT_WEIGHTS",
        f"{path.name} is no valid safetensors file ({reason}). Copy or publish it again from where it was made.",
        file=path.name,
        size_bytes=str(os.path.getsize(path)) if path.exists() else "0",  # noqa: PTH202
    )
