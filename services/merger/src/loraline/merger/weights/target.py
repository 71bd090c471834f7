"""One shard file on its way to the disk, written at several places at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loraline.merger.weights.copy import reserve, start_writeback, write_at

_WRITEBACK = 32 * 1024 * 1024
"""Bytes after which the kernel is asked to begin writing to the disk."""


class ShardTarget:
    """The file of a shard, under another name until it is whole.

    Its room on the disk is taken before anything is written: a full disk shows at once, and writing costs less.

    `later` runs a step that may wait for the disk where nobody waits for it.
    """

    def __init__(self, path: Path, size: int, later: Callable[[Callable[[], None]], object]):
        self._path, self._later = path, later
        self._unfinished = path.with_name(path.name + ".partial")
        self._written = self._begun = 0
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        self.descriptor = os.open(self._unfinished, flags, 0o644)
        try:
            reserve(self.descriptor, size)
        except OSError:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`; any thread may, at places of its own."""
        write_at(self.descriptor, data, offset)
        self.wrote(len(data))

    def wrote(self, size: int) -> None:
        """Count bytes, and let the disk begin now and then, so that the sync at the end finds little left to do."""
        self._written += size  # two threads may lose a count to each other; it only times a hint
        if self._written - self._begun >= _WRITEBACK:
            self._begun = self._written
            self._later(self._hint)

    def _hint(self) -> None:
        if not self._closed:
            start_writeback(self.descriptor)

    def finish(self) -> None:
        """Bring the file to the disk and give it its name. All writes must have ended."""
        try:
            os.fsync(self.descriptor)
        finally:
            self.close()
        self._unfinished.replace(self._path)

    def close(self) -> None:
        """Give the file up as it is; its name still says that it is not whole."""
        if not self._closed:
            self._closed = True
            os.close(self.descriptor)
