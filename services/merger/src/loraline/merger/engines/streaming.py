"""Writes a merged model shard by shard, in blocks of rows: each base byte is read once and memory stays bounded.

A shard is written under another name, synced, and renamed when it is whole; which shards are done is kept beside them,
so that a job that was killed goes on at the shard where it stopped.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loraline.core.errors import LoralineError, failed_precondition, resource_exhausted
from loraline.merger.engines.deltas import TORCH_DTYPES, RowSource
from loraline.merger.weights.copy import copy_range, write_all
from loraline.merger.weights.header import Form, ShardHeader, TensorInfo, corrupt_weights, encode_header
from loraline.merger.weights.layout import INDEX_FILE, WeightFiles

BLOCK_ELEMENTS = 4 * 1024 * 1024
"""Elements computed at a time: 16 MiB in float32, three such buffers at the most."""
STATE_FILE = ".merge_state.json"


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
    advance: Callable[[int], None] = lambda size: None,
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
        for number, shard in enumerate(weights.shards, start=1):
            relative = shard.path.relative_to(weights.folder).as_posix()
            if relative in done:
                size, merged = done[relative]
                result.resumed_shards.append(relative)
                advance(size)
            else:
                last = number == len(weights.shards)
                size, merged = _write_shard(shard, rows, form, out / relative, advance, last=last)
                done[relative] = (size, merged)
                _save_state(state_path, fingerprint, done)
            result.bytes_written += size
            result.merged_tensors += merged
        if weights.indexed:
            _write_index(weights, form, out)
    except OSError as error:
        raise disk_error(error, out) from error
    return result


def _write_shard(
    shard: ShardHeader, rows: RowSource, form: Form, target: Path, advance: Callable[[int], None], *, last: bool
) -> tuple[int, int]:
    header, placed = encode_header(shard, form, last=last)
    size = len(header) + (placed[-1].end if placed else 0)
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_space(target.parent, size)
    partial = target.with_name(target.name + ".partial")
    merged = 0
    with shard.path.open("rb") as source, partial.open("wb", buffering=0) as file, _tensors_of(shard) as reader:
        write_all(file.fileno(), memoryview(header))
        for old, new in zip(shard.tensors, placed[: len(shard.tensors)], strict=True):
            changed = rows.changes(old.name)
            merged += changed
            if not changed and form.keeps(old):
                try:
                    copy_range(source.fileno(), file.fileno(), shard.data_start + old.start, old.size, advance)
                except EOFError as error:
                    raise corrupt_weights(shard.path, str(error)) from error
            else:
                _write_tensor(reader, rows if changed else None, old, new, file.fileno(), advance)
        for new in placed[len(shard.tensors) :]:
            _write_fresh(rows, new, file.fileno())
            merged += 1
        os.fsync(file.fileno())
    partial.replace(target)
    return size, merged


def _tensors_of(shard: ShardHeader) -> Any:
    return safe_open(shard.path, framework="pt")


def _write_tensor(
    reader: Any, rows: RowSource | None, old: TensorInfo, new: TensorInfo, target: int, advance: Callable[[int], None]
) -> None:
    """Write one changed or converted tensor in blocks of rows."""
    if not old.shape:
        _write_block(reader.get_tensor(old.name), new, target)
        advance(old.size)
        return
    if old.shape != new.shape and rows is not None:
        _write_fresh(rows, new, target)
        advance(old.size)
        return
    source = reader.get_slice(old.name)
    count = old.shape[0]
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(old.shape[1:])))
    for start in range(0, count, step):
        base = source[start : min(count, start + step)]
        _write_block(base if rows is None else rows.rows(old.name, base, start), new, target)
        advance(old.size * base.shape[0] // count)


def _write_fresh(rows: RowSource, new: TensorInfo, target: int) -> None:
    """Write a tensor whose shape the base does not have."""
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(new.shape[1:])))
    for start in range(0, new.shape[0], step):
        _write_block(rows.fresh(new.name, start, min(new.shape[0], start + step)), new, target)


def _write_block(values: torch.Tensor, new: TensorInfo, target: int) -> None:
    rounded = values.to(TORCH_DTYPES[new.dtype]).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise failed_precondition(
            "MERGE_NOT_FINITE",
            f"{new.name} has infinite or undefined values after the merge as {new.dtype}. "
            "The base or the adapter is broken, or the type is too narrow: try bf16 or fp32.",
            tensor=new.name,
            dtype=new.dtype,
        )
    write_all(target, rounded.reshape(-1).view(torch.uint8).numpy().data)


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


def _save_state(path: Path, fingerprint: str, done: dict[str, tuple[int, int]]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"fingerprint": fingerprint, "done": done}))
    partial.replace(path)


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
