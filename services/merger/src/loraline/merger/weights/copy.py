"""Bytes between open files, in the kernel where it can, and what Linux offers to write large files quickly."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

COPY_BLOCK = 32 * 1024 * 1024
"""Bytes per step, so that a wish to stop is seen in time."""
_READ_BLOCK = 1024 * 1024
"""Bytes that pass through memory at a time where the kernel cannot copy between the files."""


def copy_range(source: int, target: int, source_offset: int, target_offset: int, size: int) -> None:
    """Copy `size` bytes between file descriptors. EOFError when the source ends before."""
    done = 0
    while done < size:
        step = min(COPY_BLOCK, size - done)
        try:
            copied = os.copy_file_range(source, target, step, source_offset + done, target_offset + done)
        except OSError:  # another file system, or a kernel without it
            data = os.pread(source, min(step, _READ_BLOCK), source_offset + done)
            copied = os.pwrite(target, data, target_offset + done)
        if copied == 0:
            raise EOFError(f"the file ended {size - done} bytes early")
        done += copied


def write_at(target: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; `os.pwrite` alone may stop early, such as at 2 GiB."""
    while data:
        written = os.pwrite(target, data, offset)
        data, offset = data[written:], offset + written


def reserve(descriptor: int, size: int) -> None:
    """Take room for `size` bytes on the disk; OSError ENOSPC without it. File systems that cannot are left alone.

    Not os.posix_fallocate, which writes to every block where the file system has no such call.
    """
    if _fallocate is None or not size:
        return
    if _fallocate(descriptor, 0, 0, size):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def start_writeback(descriptor: int) -> None:
    """Ask the kernel to begin writing what is new in the file to the disk.

    Only a hint: without it (other systems than Linux) the data are as safe, and later.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


def _of_libc(name: str, *arguments: Any) -> Any:
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = arguments
    return function


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = _of_libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_fallocate = _of_libc("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
