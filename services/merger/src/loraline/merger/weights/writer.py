"""Writes files in a thread of its own, in order, so that computing the next block does not wait for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

from loraline.merger.weights.copy import write_all

_DEPTH = 4
"""Steps that may wait: enough to keep the disk busy, few enough for memory to stay flat."""


class OrderedWriter:
    """Runs steps one after another in a thread. A step's error is raised by the next call, and later steps are dropped.

    Use it as a context manager: leaving waits for all steps. Steps that were accepted before an error of the caller's
    own are still carried out, so what they finish is finished.
    """

    def __init__(self) -> None:
        self._steps: queue.Queue[Callable[[], None] | None] = queue.Queue(_DEPTH)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="merge-writer", daemon=True)

    def write(self, descriptor: int, data: memoryview) -> None:
        """Append `data`; it must not change any more."""
        self.step(lambda: write_all(descriptor, data))

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
