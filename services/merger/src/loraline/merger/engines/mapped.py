"""The tensors of one shard, mapped from its file: rows are read where they lie, without a copy in memory."""

from __future__ import annotations

import math
import mmap
import warnings
from types import TracebackType

import torch
from safetensors import safe_open

from loraline.merger.engines.deltas import TORCH_DTYPES
from loraline.merger.weights.header import ShardHeader, TensorInfo

_AHEAD = 32 * 1024 * 1024
_MADV_POPULATE_READ = 22
_PASSED = 64 * 1024 * 1024
"""Bytes after which pages that were read are given back, so that the process looks as small as it is."""


class MappedShard:
    """Gives rows as views of the file, which nobody may write to: the map is read-only, and torch does not know it.

    A view stays valid as long as somebody holds it, even after the end of the `with`: pages that were given back are
    read again from the file when they are looked at. The file must not change meanwhile.
    """

    def __init__(self, shard: ShardHeader):
        self._shard = shard
        self._passed = 0
        self._fetched = 0
        self._populates = True

    def __enter__(self) -> MappedShard:
        with self._shard.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._reader = safe_open(self._shard.path, framework="pt")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._reader  # views may still live; the map goes with the last of them

    def rows(self, tensor: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor in its stored type; a scalar as it is."""
        dtype = TORCH_DTYPES.get(tensor.dtype)
        row = tensor.size // tensor.shape[0] if tensor.shape and tensor.shape[0] else tensor.size
        offset = self._shard.data_start + tensor.start + start * row
        if dtype is None or not tensor.shape or not row or offset % dtype.itemsize:
            return (
                self._reader.get_slice(tensor.name)[start:stop]
                if tensor.shape
                else self._reader.get_tensor(tensor.name)
            )
        self._release(offset)
        self._fetch(offset)
        count = (stop - start) * math.prod(tensor.shape[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the buffer is not writable, and nobody writes to it
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        return flat.reshape(stop - start, *tensor.shape[1:])

    def _fetch(self, offset: int) -> None:
        """Map the pages ahead in one go; touching them one by one costs about as much as the sums."""
        if not self._populates or self._fetched >= min(offset + _AHEAD // 2, len(self._map)):
            return
        start = max(self._fetched, offset - offset % mmap.PAGESIZE)
        try:
            self._map.madvise(_MADV_POPULATE_READ, start, min(_AHEAD, len(self._map) - start))
        except OSError:  # a kernel before 5.14
            self._populates = False
        self._fetched = start + _AHEAD

    def _release(self, offset: int) -> None:
        """Give back the pages before the block that was asked for last; a later look would read them again."""
        if hasattr(mmap, "MADV_DONTNEED") and offset - self._passed > 2 * _PASSED:
            self._map.madvise(mmap.MADV_DONTNEED, self._passed, _PASSED)
            self._passed += _PASSED
