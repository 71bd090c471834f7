"""Writes a merged model shard by shard, in blocks of rows: each base byte is read once and memory stays bounded.

A shard is written under another name, synced, and renamed when it is whole; which shards are done is kept beside them,
so that a job that was killed goes on at the shard where it stopped. Threads compute blocks and write them in place.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from loraline.core.errors import LoralineError, failed_precondition, resource_exhausted
from loraline.merger.engines.crew import BYTES_PER_ELEMENT, Crew, Scratch
from loraline.merger.engines.deltas import TORCH_DTYPES, RowSource
from loraline.merger.engines.mapped import MappedShard
from loraline.merger.weights.copy import COPY_BLOCK, copy_range
from loraline.merger.weights.header import Form, ShardHeader, TensorInfo, corrupt_weights, encode_header
from loraline.merger.weights.layout import INDEX_FILE, WeightFiles
from loraline.merger.weights.target import ShardTarget

BLOCK_ELEMENTS = 512 * 1024
"""Elements computed at a time: 2 MiB in float32, which stay in the processor's cache from one step to the next."""
_ROWS = 128
"""Blocks are whole multiples of this many rows: matrix libraries compute the rows that are left over at the end of a
product by other code, and such rows in the middle of a tensor would differ from peft's in a last bit here and there."""
_MOST_THREADS = 4
_BUFFERS = 96 * 1024 * 1024
"""Bytes that the buffers of all threads may take."""
STATE_FILE = ".merge_state.json"
Advance = Callable[[int], None]
Step = Callable[[Scratch], None]


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
    done = _Done(out.with_name(out.name + STATE_FILE), out, fingerprint)
    result = StreamedMerge()
    try:
        with Crew(_threads(weights, form)) as crew:
            for number, shard in enumerate(weights.shards, start=1):
                relative = shard.path.relative_to(weights.folder).as_posix()
                if relative in done.shards:
                    size, merged = done.shards[relative]
                    result.resumed_shards.append(relative)
                    advance(size)
                else:
                    last = number == len(weights.shards)
                    task = _Shard(shard, rows, form, out / relative, advance, crew, last)
                    size, merged = task.write(partial(done.note, relative))
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
    crew: Crew
    last: bool

    def write(self, finished: Callable[[int, int], None]) -> tuple[int, int]:
        """Queue the whole shard; `finished` is called with size and merged tensors once it is safe on the disk."""
        header, placed = encode_header(self.source, self.form, last=self.last)
        size, merged = len(header) + (placed[-1].end if placed else 0), 0
        target = ShardTarget(self.target, size, self.crew.later)
        blocks: list[Future[None]] = []
        source = self.source.path.open("rb")

        def close() -> None:
            source.close()
            target.close()

        def finish() -> None:
            target.finish()
            source.close()
            finished(size, merged)

        try:
            target.write(memoryview(header), 0)
            with MappedShard(self.source) as tensors:
                for old, new in zip(self.source.tensors, placed[: len(self.source.tensors)], strict=True):
                    changed = self.rows.changes(old.name)
                    merged += changed
                    if not changed and self.form.keeps(old):
                        steps = self._copy(source.fileno(), old, target, len(header) + new.start)
                    else:
                        steps = self._tensor(tensors, old, new, target, len(header), changed=changed)
                    for step, read in steps:
                        blocks.append(self.crew.block(step))
                        self.advance(read)
                for new in placed[len(self.source.tensors) :]:
                    for step in self._fresh(new, target, len(header)):
                        blocks.append(self.crew.block(step))
                        self.advance(0)
                    merged += 1
        except BaseException:
            wait(blocks)
            close()
            raise
        self.crew.after(blocks, finish, close)
        return size, merged

    def _copy(self, source: int, tensor: TensorInfo, target: ShardTarget, offset: int) -> Iterator[tuple[Step, int]]:
        """Yield the parts of a tensor that stays as it is, and their bytes."""
        start, path = self.source.data_start + tensor.start, self.source.path

        def copy(at: int, size: int, scratch: Scratch) -> None:
            try:
                copy_range(source, target.descriptor, start + at, offset + at, size)
            except EOFError as error:
                raise corrupt_weights(path, str(error)) from error
            target.wrote(size)

        for at in range(0, tensor.size, COPY_BLOCK):
            size = min(COPY_BLOCK, tensor.size - at)
            yield partial(copy, at, size), size

    def _tensor(
        self, tensors: MappedShard, old: TensorInfo, new: TensorInfo, target: ShardTarget, begin: int, *, changed: bool
    ) -> Iterator[tuple[Step, int]]:
        """Yield the blocks of one changed or converted tensor, and the bytes of the base that each stands for."""
        if changed and old.shape != new.shape:
            yield from ((step, 0) for step in self._fresh(new, target, begin))
            yield lambda scratch: None, old.size
            return
        change = self.rows.rows(old.name) if changed else None
        count, step = (old.shape[0], rows_at_a_time(old.shape)) if old.shape else (1, 1)
        row = new.size // max(1, count)
        for start in range(0, count, step):
            base = tensors.rows(old, start, min(count, start + step))
            offset, rows = begin + new.start + start * row, base.shape[0] if old.shape else 1
            make = partial(change, base, start) if change else partial(_as_it_is, base)
            yield partial(_write_block, make, new, target, offset), old.size * rows // count

    def _fresh(self, new: TensorInfo, target: ShardTarget, begin: int) -> Iterator[Step]:
        """Yield the blocks of a tensor whose shape the base does not have."""
        step, row = rows_at_a_time(new.shape), new.size // max(1, new.shape[0])
        for start in range(0, new.shape[0], step):
            make = partial(self._values, new.name, start, min(new.shape[0], start + step))
            yield partial(_write_block, make, new, target, begin + new.start + start * row)

    def _values(self, name: str, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        return self.rows.fresh(name, start, stop)


def _as_it_is(base: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    return base


def _write_block(
    make: Callable[[Scratch], torch.Tensor], new: TensorInfo, target: ShardTarget, offset: int, scratch: Scratch
) -> None:
    values = make(scratch)
    written = scratch.written(values.shape, TORCH_DTYPES[new.dtype]).copy_(values)
    if not _finite(written):
        raise failed_precondition(
            "MERGE_NOT_FINITE",
            f"{new.name} has infinite or undefined values after the merge as {new.dtype}. "
            "The base or the adapter is broken, or the type is too narrow: try bf16 or fp32.",
            tensor=new.name,
            dtype=new.dtype,
        )
    target.write(written.reshape(-1).view(torch.uint8).numpy().data, offset)


def _finite(values: torch.Tensor) -> bool:
    """Whether all values are finite. A sum carries on what is not, at a fortieth of the cost of looking at each value;
    only a sum that overflows by itself needs the second look."""
    if not values.numel() or math.isfinite(float(values.sum())):
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(values))


def rows_at_a_time(shape: tuple[int, ...]) -> int:
    """Return how many rows of a tensor make a block."""
    rows = BLOCK_ELEMENTS // max(1, math.prod(shape[1:]))
    if len(shape) > 2:  # experts: each is a matrix of its own, and never cut
        return max(1, rows)
    return max(_ROWS, rows - rows % _ROWS)


def _threads(weights: WeightFiles, form: Form) -> int:
    """Return how many threads compute: as many as processors, while their buffers stay small beside a wide matrix."""
    shapes = [form.of(tensor)[1] for _, tensor in weights.tensors()] + list(form.added.values())
    blocks = (min(shape[0], rows_at_a_time(shape)) * math.prod(shape[1:]) for shape in shapes if shape)
    each = max(blocks, default=1) * BYTES_PER_ELEMENT
    return max(1, min(_MOST_THREADS, torch.get_num_threads(), _BUFFERS // max(1, each)))


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


class _Done:
    """Which shards are finished, kept in a file beside them for an attempt that follows a kill."""

    def __init__(self, path: Path, out: Path, fingerprint: str):
        self._path, self._fingerprint = path, fingerprint
        self._lock = threading.Lock()
        self.shards = _load_state(path, out, fingerprint)

    def note(self, name: str, size: int, merged: int) -> None:
        """Write down that a shard is whole; any thread may."""
        with self._lock:
            self.shards[name] = (size, merged)
            unfinished = self._path.with_name(self._path.name + ".partial")
            unfinished.write_text(json.dumps({"fingerprint": self._fingerprint, "done": self.shards}))
            unfinished.replace(self._path)


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


def disk_error(error: OSError, folder: Path) -> LoralineError | OSError:
    """Turn a full disk into a typed error; other errors of the system stay as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return disk_full(folder, os.strerror(error.errno))
    return error


def disk_full(folder: Path, why: str) -> LoralineError:
    """RESOURCE_EXHAUSTED for a disk without room."""
    return resource_exhausted(
        "DISK_FULL", f"No room in {folder}: {why}. Free some space and resume the job; finished shards are kept."
    )
