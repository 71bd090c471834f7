"""SHA-256 of files, several at once: hashlib lets other threads run while it works."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from loraline.core.artifacts.manifest import FileEntry

PIECE = 1024 * 1024
_WORKERS = max(2, min(8, os.cpu_count() or 2))

T = TypeVar("T")
R = TypeVar("R")


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...


def in_parallel(function: Callable[[T], R], items: Iterable[T], workers: int = _WORKERS) -> list[R]:
    """Call the function on every item, several at once; the first error is raised after all running calls ended."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items)), thread_name_prefix="artifacts") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_into(descriptor: int, hasher: _Hash, each: Callable[[memoryview], None] | None = None) -> int:
    """Feed an open file to the hasher, and each piece to `each`; return the bytes read."""
    buffer = memoryview(bytearray(PIECE))
    total = 0
    while count := os.readv(descriptor, [buffer]):
        piece = buffer[:count]
        hasher.update(piece)
        if each is not None:
            each(piece)
        total += count
    return total


def sha256_file(path: Path, advance: Callable[[int], None] | None = None) -> tuple[str, int]:
    """Return a file's SHA-256 in hex and its size in bytes; `advance` is told of each piece's size."""
    hasher = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = read_into(descriptor, hasher, None if advance is None else lambda piece: advance(len(piece)))
    finally:
        os.close(descriptor)
    return hasher.hexdigest(), size


class VerifiedFiles:
    """Remembers local files found intact, by size, time of change and inode, so as not to hash them twice."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int, int, str]] = {}
        self._lock = threading.Lock()

    def check(self, folder: Path, files: Sequence[FileEntry], *, force: bool = False) -> dict[str, str]:
        """Return path -> what is wrong, for the files of the folder that differ; `force` reads them all again."""
        found = in_parallel(lambda entry: (entry.path, self.problem(folder, entry, force=force)), files)
        return {path: problem for path, problem in found if problem}

    def problem(self, folder: Path, entry: FileEntry, *, force: bool = False) -> str:
        """Return what is wrong with one file, or an empty text."""
        path = folder / entry.path
        try:
            status = path.stat()
            if status.st_size != entry.size:
                return f"has {status.st_size} bytes instead of {entry.size}"
            mark = (status.st_size, status.st_mtime_ns, status.st_ino, entry.sha256)
            with self._lock:
                if not force and self._known.get(str(path)) == mark:
                    return ""
            actual, _ = sha256_file(path)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"can't be read ({error.strerror})"
        if actual != entry.sha256:
            return f"has SHA-256 {actual[:12]}… instead of {entry.sha256[:12]}…"
        self._remember(path, mark)
        return ""

    def intact(self, path: Path, sha256: str) -> None:
        """Remember a file that was just written with this content."""
        status = path.stat()
        self._remember(path, (status.st_size, status.st_mtime_ns, status.st_ino, sha256))

    def _remember(self, path: Path, mark: tuple[int, int, int, str]) -> None:
        with self._lock:
            self._known[str(path)] = mark
