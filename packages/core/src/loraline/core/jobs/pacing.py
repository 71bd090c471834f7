"""How often progress enters the event log, so that a week of training leaves a log that is still a pleasure to read."""

from __future__ import annotations

_SHORTEST_SECONDS = 1.0
_LONGEST_SECONDS = 30.0
_DETAIL = 600


def share(step: int, total_steps: int, fraction: float | None) -> float:
    """Return how much is done, 0 to 1: the fraction that was told, or what the steps say."""
    if fraction is None:
        fraction = step / total_steps if total_steps > 0 else 0.0
    return min(1.0, max(0.0, fraction))


class EventPace:
    """Thins out progress events the longer an attempt runs.

    One a second for the first ten minutes, then 600 for each e-fold of the running time, at last one each 30 s: about
    2,600 in five hours and 20,000 in a week. The job's record itself is always fresh.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self._last = 0.0

    def due(self, now: float) -> bool:
        """Tell whether a progress written at this time (seconds, monotonic) shall be logged, and count on it."""
        if self._start is None:
            self._start = self._last = now
            return True
        gap = min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, (now - self._start) / _DETAIL))
        if now - self._last < gap * 0.99:  # timers fire a little early
            return False
        self._last = now
        return True
