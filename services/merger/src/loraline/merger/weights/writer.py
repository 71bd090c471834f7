"""Writes files in a thread of its own, in order, so that computing the next block does not wait for the disk."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType

from loraline.merger.weights.copy import start_writeback, write_all

_DEPTH = 4
"""Steps that may wait: enough to keep the disk busy, few enough for memory to stay flat."""
_WRITEBACK = 32 * 1024 * 1024
"""Bytes after which the kernel is asked to begin writing to the disk."""


class OrderedWriter:
    """Runs steps one after another in a thread. A step's error is raised by the next call, and later steps are dropped.

    Use it as a context manager: leaving waits for all steps. Steps that were accepted before an error of the caller's
    own are still carried out, so what they finish is finished.
    """

    def __init__(self) -> None:
        self._steps: queue.Queue[Callable[[], None] | None] = queue.Queue(_DEPTH)
        self._error: BaseException | None = None
        self._begun: dict[int, int] = {}
        """File descriptor -> bytes whose way to the disk has begun."""
        self._thread = threading.Thread(target=self._run, name="merge-writer", daemon=True)

    def write(self, descriptor: int, data: memoryview) -> None:
        """Append `data`; it must not change any more."""
        self.step(lambda: self._append(descriptor, data))

    def step(self, action: Callable[[], None]) -> None:
        """Run `action` after all steps before it."""
        self._raise()
        self._steps.put(action)

    def __enter__(self) -> OrderedWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _append(self, descriptor: int, data: memoryview) -> None:
        write_all(descriptor, data)
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        begun = self._begun.get(descriptor, 0)
        if at < begun:  # the number belongs to another file by now
            begun = 0
        if at - begun >= _WRITEBACK:
            start_writeback(descriptor, begun, at - begun)
            begun = at
        self._begun[descriptor] = begun

    def _run(self) -> None:
        while (action := self._steps.get()) is not None:
            if self._error is None:
                try:
                    action()
                except BaseException as error:  # told to the caller by its next call
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
