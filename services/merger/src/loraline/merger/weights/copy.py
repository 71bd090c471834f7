"""Byte-for-byte copies between open files, in the kernel where it can."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

COPY_BLOCK = 32 * 1024 * 1024
"""Bytes per step, so that progress and stop requests are seen in time."""


def copy_range(source: int, target: int, start: int, size: int, advance: Callable[[int], None]) -> None:
    """Append `size` bytes of file descriptor `source` from `start` to `target`; `advance` is told bytes as they go."""
    done = 0
    while done < size:
        step = min(COPY_BLOCK, size - done)
        try:
            copied = os.copy_file_range(source, target, step, offset_src=start + done)
        except OSError:  # another file system, or a kernel without it
            copied = os.write(target, os.pread(source, step, start + done))
        if copied == 0:
            raise EOFError(f"the file ended {size - done} bytes early")
        done += copied
        advance(copied)


def start_writeback(descriptor: int, start: int, size: int) -> None:
    """Ask the kernel to begin writing these bytes to the disk, so that the sync at the end finds little left to do.

    Only a hint: without it (other systems than Linux) the data are as safe, and later.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, start, size, _SYNC_FILE_RANGE_WRITE)


def _find_sync_file_range() -> Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = _find_sync_file_range()


def write_all(target: int, data: memoryview) -> None:
    """Append all of `data`; `os.write` alone may stop early, such as at 2 GiB."""
    while data:
        data = data[os.write(target, data) :]
