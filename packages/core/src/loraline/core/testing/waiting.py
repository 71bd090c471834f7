"""Waits in tests for what happens in other processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from loraline.api.job.v1.job_pb2 import Job
from loraline.core.jobs.queue import JobQueue

T = TypeVar("T")
PATIENCE = 60.0


async def until(look: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
    """Return what `look` gives once it is true; RuntimeError names `what` after so many seconds."""
    give_up = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > give_up:
            raise RuntimeError(f"waited {seconds} s in vain for {what}")
        await asyncio.sleep(0.02)
    return found


async def until_state(queue: JobQueue, name: str, states: Collection[int], seconds: float = PATIENCE) -> Job:
    """Return a job once it is in one of these states; RuntimeError after so many seconds."""
    give_up = time.monotonic() + seconds
    while (job := await queue.get(name)).state not in states:
        if time.monotonic() > give_up:
            raise RuntimeError(f"waited {seconds} s in vain for {states}, the job is {job}")
        await asyncio.sleep(0.02)
    return job


def alive(pid: int) -> bool:
    """Tell whether a process runs; zombies do not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
