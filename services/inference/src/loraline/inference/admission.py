"""The bounded queue: so many answers run or wait, and no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from loraline.core.errors import LoralineError, resource_exhausted

_LONGEST_WAIT = 60.0
_MEMORY = 0.8
"""Weight of the past in the mean time of an answer."""


class Admission:
    """Counts the answers that are asked for. The engine orders them; here it is only decided who may queue up.

    A request counts for its n answers. Whoever is let in leaves when the answer ended, its client went away or its
    deadline passed.
    """

    def __init__(self, queue_limit: int, slots: Callable[[], int], clock: Callable[[], float] = time.monotonic):
        self._queue_limit = queue_limit
        self._slots = slots
        self._clock = clock
        self._inside = 0
        self._mean_seconds = 1.0

    @property
    def waiting(self) -> int:
        """Answers that wait for one of the engine's slots."""
        return max(0, self._inside - self._slots())

    @contextmanager
    def place(self, answers: int) -> Iterator[None]:
        """Hold a place for a request's answers. RESOURCE_EXHAUSTED QUEUE_FULL, with a time to come back."""
        slots = self._slots()
        # An idle server takes every request that is within the other limits, however small its queue.
        if self._inside and self._inside + answers > slots + self._queue_limit:
            raise self._full(slots)
        self._inside += answers
        begun = self._clock()
        try:
            yield
        finally:
            self._inside -= answers
            self._mean_seconds = _MEMORY * self._mean_seconds + (1 - _MEMORY) * (self._clock() - begun)

    def _full(self, slots: int) -> LoralineError:
        waiting = self.waiting
        message = (
            f"This server is busy: {self._inside - waiting} answers are being generated and {waiting} are waiting, as "
            f"many as may. Try again later. Operators set LORALINE_INFERENCE_MAX_QUEUED_REQUESTS (now "
            f"{self._queue_limit})."
        )
        error = resource_exhausted("QUEUE_FULL", message, waiting=str(waiting), limit=str(self._queue_limit))
        seconds = self._mean_seconds * (waiting + 1) / slots
        error.retry_after = timedelta(seconds=min(max(seconds, 1.0), _LONGEST_WAIT))
        return error
