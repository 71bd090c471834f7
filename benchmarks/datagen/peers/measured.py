"""One client's part of the comparison with peers: pinned to one core, warmed up, measured; its figures as a JSON line.

Standard library only: each peer's interpreter runs it in a virtual environment that holds that peer and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Ours asks in these words for rows of its recipe; peers get them ready-made, their number as the only variable.
PROMPT = (
    "Write 1 different item. This is batch %d; its items differ from those of other batches. Answer with one JSON "
    'object {"items": [...]} and nothing else. Each item fits this JSON schema:\n'
    '{"type": "object", "properties": {"instruction": {"type": "string", "minLength": 1}, "response": {"type": '
    '"string", "minLength": 1}}, "required": ["instruction", "response"], "additionalProperties": false}'
)


@dataclass(frozen=True)
class Task:
    """What a client is to do: make `rows` rows with one request each, keeping all its files in `folder`."""

    url: str
    rows: int
    in_flight: int
    folder: Path


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    told = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in told)


def prompts(rows: int) -> list[str]:
    """Return the prompts of `rows` rows, numbered from 1."""
    return [PROMPT % number for number in range(1, rows + 1)]


def main(package: str, work: Callable[[Task], int]) -> None:
    """Run `work`, which returns the rows that it delivered, on one core. With --warm it runs once before, unmeasured:
    imports and compiled caches are not what is compared."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--url", required=True)
    arguments.add_argument("--rows", type=int, required=True)
    arguments.add_argument("--in-flight", type=int, required=True)
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("--core", type=int, required=True)
    arguments.add_argument("--warm", type=int, default=0)
    wanted = arguments.parse_args()
    os.sched_setaffinity(0, {wanted.core})
    if wanted.warm:
        work(Task(wanted.url, wanted.warm, wanted.in_flight, wanted.folder / "warm"))
    begin, cpu = time.perf_counter(), cpu_seconds()
    rows = work(Task(wanted.url, wanted.rows, wanted.in_flight, wanted.folder / "measured"))
    told = {"rows": rows, "wall": time.perf_counter() - begin, "cpu": cpu_seconds() - cpu,
            "version": importlib.metadata.version(package)}  # fmt: skip
    print(json.dumps(told), flush=True)
