"""Locks on files: held by one process at a time and let go by the system, also when that process is killed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from loraline.core.errors import failed_precondition

_LOCKED_BYTE = 1 << 30
"""Where Windows locks: far behind the text, which others must be able to read."""

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        while True:
            try:
                # LK_LOCK gives up after ten seconds; whoever waits, waits on.
                msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
                return
            except OSError:
                if not wait:
                    raise
else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked_file(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold a file's lock for the block and give its descriptor; OSError when another holds it and `wait` is off."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, wait=wait)
        yield descriptor
    finally:
        os.close(descriptor)  # closing lets go of the lock


@contextmanager
def sole_user(folder: Path, stages: Sequence[str]) -> Iterator[None]:
    """Hold a data folder for these stages; FAILED_PRECONDITION DATA_DIR_IN_USE names the process that has it.

    Two servers of one stage on one folder would run each other's jobs and overwrite each other's state.
    """
    with contextlib.ExitStack() as held:
        for stage in stages:
            path = folder / f"{stage}.lock"
            try:
                descriptor = held.enter_context(locked_file(path, wait=False))
            except OSError as error:
                raise _in_use(folder, stage, path) from error
            started = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}, since {started}\n".encode(), 0)
        yield


def _in_use(folder: Path, stage: str, path: Path) -> Exception:
    try:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        holder = "another process"
    message = (
        f"The data folder {folder} is in use: a server of {stage} runs there ({holder}). Use that one, stop it first, "
        "or choose another folder with `loraline up --data-dir FOLDER` (or LORALINE_DATA_DIR)."
    )
    return failed_precondition("DATA_DIR_IN_USE", message, path=str(folder), stage=stage, holder=holder)
