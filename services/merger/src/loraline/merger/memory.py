"""How much memory this process holds that is not backed by files."""

from __future__ import annotations

import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_SECONDS = 0.05


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class PeakMemory:
    """The greatest value seen; sampled, so that short peaks between two samples are missed."""

    def __init__(self) -> None:
        self.greatest = anonymous_bytes()
        self._next = 0.0

    def sample(self) -> None:
        """Look, at most twenty times a second."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS
            self.greatest = max(self.greatest, anonymous_bytes())
