"""Writes a merged model shard by shard, in blocks of rows: each base byte is read once and memory stays bounded.

A shard is written under another name, synced, and renamed when it is whole; which shards are done is kept beside them,
so that a job that was killed goes on at the shard where it stopped. Blocks are computed here while a thread writes and
syncs those before them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from loraline.core.errors import LoralineError, failed_precondition, resource_exhausted
from loraline.merger.engines.deltas import TORCH_DTYPES, RowSource
from loraline.merger.engines.mapped import MappedShard
from loraline.merger.weights.copy import copy_range
from loraline.merger.weights.header import Form, ShardHeader, TensorInfo, corrupt_weights, encode_header
from loraline.merger.weights.layout import INDEX_FILE, WeightFiles
from loraline.merger.weights.writer import OrderedWriter

BLOCK_ELEMENTS = 512 * 1024
"""Elements computed at a time: 2 MiB in float32, which stay in the processor's cache from one step to the next."""
_ROWS = 128
"""Blocks are whole multiples of this many rows: matrix libraries compute the rows that are left over at the end of a
product by other code, and such rows in the middle of a tensor would differ from peft's in a last bit here and there."""
_MOST_THREADS = 4
STATE_FILE = ".merge_state.json"
Advance = Callable[[int], None]


@dataclass
class StreamedMerge:
    """What the streaming writer did."""

    merged_tensors: int = 0
    bytes_written: int = 0
    resumed_shards: list[str] = field(default_factory=list)


def write_merged(
    weights: WeightFiles,
    rows: RowSource,
    form: Form,
    out: Path,
    *,
    fingerprint: str,
    advance: Advance = lambda size: None,
) -> StreamedMerge:
    """Write the base's shards into `out` with the changed tensors replaced; names, order and files stay the base's.

    `advance` is called with the bytes of each step and may raise to stop. Raises RESOURCE_EXHAUSTED (DISK_FULL),
    FAILED_PRECONDITION (MERGE_NOT_FINITE) or DATA_LOSS (CORRUPT_WEIGHTS).
    """
    out.mkdir(parents=True, exist_ok=True)
    state_path = out.with_name(out.name + STATE_FILE)
    done = _load_state(state_path, out, fingerprint)
    result = StreamedMerge()
    try:
        # Syncing a shard waits for the disk; the next shard's writes shall not wait with it.
        with _threads(), OrderedWriter() as syncer, OrderedWriter() as writer:
            for number, shard in enumerate(weights.shards, start=1):
                relative = shard.path.relative_to(weights.folder).as_posix()
                if relative in done:
                    size, merged = done[relative]
                    result.resumed_shards.append(relative)
                    advance(size)
                else:
                    last = number == len(weights.shards)

                    task = _Shard(shard, rows, form, out / relative, advance, writer, syncer, last)
                    size, merged = task.write(partial(_note_done, state_path, fingerprint, done, relative))
                result.bytes_written += size
                result.merged_tensors += merged
        if weights.indexed:
            _write_index(weights, form, out)
    except OSError as error:
        raise disk_error(error, out) from error
    return result


@dataclass(frozen=True)
class _Shard:
    """One shard on its way to the disk."""

    source: ShardHeader
    rows: RowSource
    form: Form
    target: Path
    advance: Advance
    writer: OrderedWriter
    syncer: OrderedWriter
    last: bool

    def write(self, finished: Callable[[int, int], None]) -> tuple[int, int]:
        """Queue the whole shard; `finished` is called with size and merged tensors once it is safe on the disk."""
        header, placed = encode_header(self.source, self.form, last=self.last)
        size, merged = len(header) + (placed[-1].end if placed else 0), 0
        self.target.parent.mkdir(parents=True, exist_ok=True)
        _require_space(self.target.parent, size)
        unfinished = self.target.with_name(self.target.name + ".partial")
        source, target = self.source.path.open("rb"), unfinished.open("wb", buffering=0)
        try:
            self.writer.write(target.fileno(), memoryview(header))
            with MappedShard(self.source) as tensors:
                for old, new in zip(self.source.tensors, placed[: len(self.source.tensors)], strict=True):
                    changed = self.rows.changes(old.name)
                    merged += changed
                    if not changed and self.form.keeps(old):
                        self._copy(source.fileno(), old, target.fileno())
                    else:
                        self._tensor(tensors, old, new, target.fileno(), changed=changed)
                for new in placed[len(self.source.tensors) :]:
                    self._fresh(new, target.fileno())
                    merged += 1
        except BaseException:
            self.writer.step(source.close)
            self.writer.step(target.close)
            raise

        def finish() -> None:
            os.fsync(target.fileno())
            source.close()
            target.close()
            unfinished.replace(self.target)
            finished(size, merged)

        self.writer.step(lambda: self.syncer.step(finish))
        return size, merged

    def _copy(self, source: int, tensor: TensorInfo, target: int) -> None:
        start, path = self.source.data_start + tensor.start, self.source.path

        def copy() -> None:
            try:
                copy_range(source, target, start, tensor.size, lambda size: None)
            except EOFError as error:
                raise corrupt_weights(path, str(error)) from error

        self.writer.step(copy)
        self.advance(tensor.size)

    def _tensor(self, tensors: MappedShard, old: TensorInfo, new: TensorInfo, target: int, *, changed: bool) -> None:
        """Write one changed or converted tensor in blocks of rows."""
        if not old.shape:
            self._block(tensors.rows(old, 0, 1), new, target)
            self.advance(old.size)
            return
        if old.shape != new.shape and changed:
            self._fresh(new, target)
            self.advance(old.size)
            return
        step = rows_at_a_time(old.shape)
        for start in range(0, old.shape[0], step):
            base = tensors.rows(old, start, min(old.shape[0], start + step))
            values = self.rows.rows(old.name, base, start) if changed else base
            self._block(values, new, target)
            self.advance(old.size * base.shape[0] // old.shape[0])

    def _fresh(self, new: TensorInfo, target: int) -> None:
        """Write a tensor whose shape the base does not have."""
        step = rows_at_a_time(new.shape)
        for start in range(0, new.shape[0], step):
            self._block(self.rows.fresh(new.name, start, min(new.shape[0], start + step)), new, target)

    def _block(self, values: torch.Tensor, new: TensorInfo, target: int) -> None:
        rounded = values.to(TORCH_DTYPES[new.dtype], copy=True).contiguous()  # values may lie in a reused buffer
        # Least and greatest tell as much as looking at each value, at a twentieth of the time; both carry a NaN on.
        if rounded.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(rounded)):
            raise failed_precondition(
                "MERGE_NOT_FINITE",
                f"{new.name} has infinite or undefined values after the merge as {new.dtype}. "
                "The base or the adapter is broken, or the type is too narrow: try bf16 or fp32.",
                tensor=new.name,
                dtype=new.dtype,
            )
        self.writer.write(target, rounded.reshape(-1).view(torch.uint8).numpy().data)


def rows_at_a_time(shape: tuple[int, ...]) -> int:
    """Return how many rows of a tensor make a block."""
    rows = BLOCK_ELEMENTS // max(1, math.prod(shape[1:]))
    return max(_ROWS, rows - rows % _ROWS)


@contextmanager
def _threads() -> Iterator[None]:
    """Compute with half the processors, at most four: the writer needs some, and threads that wait for each other cost
    more than they give on blocks of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(_MOST_THREADS, before // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_index(weights: WeightFiles, form: Form, out: Path) -> None:
    """Copy the index; only a change of form changes it."""
    text = (weights.folder / INDEX_FILE).read_bytes()
    if form != Form():
        index = json.loads(text)
        last = weights.shards[-1]
        placed = [encode_header(shard, form, last=shard is last)[1] for shard in weights.shards]
        total = sum(tensors[-1].end for tensors in placed if tensors)
        index["weight_map"] |= dict.fromkeys(form.added, last.path.relative_to(weights.folder).as_posix())
        index.setdefault("metadata", {})["total_size"] = total
        text = json.dumps(index, indent=2).encode() + b"\n"
    (out / INDEX_FILE).write_bytes(text)


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise disk_full(folder, f"{size} bytes are needed for the next shard, {free} are free")


def _load_state(path: Path, out: Path, fingerprint: str) -> dict[str, tuple[int, int]]:
    """Return the finished shards of an earlier attempt at the same merge; anything else is written anew."""
    try:
        state = json.loads(path.read_bytes())
        done = {name: (int(size), int(merged)) for name, (size, merged) in state["done"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if state.get("fingerprint") != fingerprint:
        return {}
    return {n: v for n, v in done.items() if (out / n).is_file() and (out / n).stat().st_size == v[0]}


def _note_done(
    path: Path, fingerprint: str, done: dict[str, tuple[int, int]], name: str, size: int, merged: int
) -> None:
    done[name] = (size, merged)
    _save_state(path, fingerprint, done)


def _save_state(path: Path, fingerprint: str, done: dict[str, tuple[int, int]]) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps({"fingerprint": fingerprint, "done": done}))
    unfinished.replace(path)


def disk_error(error: OSError, folder: Path) -> LoralineError | OSError:
    """Turn a full disk into a typed error; other errors of the system stay as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(folder, os.strerror(error.errno))
    return error


def disk_full(folder: Path, why: str) -> LoralineError:
    """RESOURCE_EXHAUSTED for a disk without room."""
    return resource_exhausted(
        "DISK_FULL", f"No room in {folder}: {why}. Free some space and resume the job; finished shards are kept."
    )
