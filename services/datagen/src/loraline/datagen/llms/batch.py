"""How many items a request asks for: as many as the model finishes."""

from __future__ import annotations

ANSWERS_FOR_ONE_MORE = 10


class BatchSize:
    """Shrinks to what fitted when an answer was cut or timed out, and grows back slowly to what was asked for."""

    def __init__(self, wanted: int):
        self.size = self._wanted = wanted
        self._good = 0

    def answered(self, asked: int, found: int, *, cut: bool) -> None:
        """Note an answer to a request for `asked` items that held `found` whole ones."""
        if cut and found < asked:
            self.size, self._good = max(1, min(self.size, found)), 0
            return
        self._good += 1
        if self._good >= ANSWERS_FOR_ONE_MORE and self.size < self._wanted:
            self.size, self._good = self.size + 1, 0

    def came_down(self, size: int) -> None:
        """Note that a request only went through at this size, after time-outs at larger ones."""
        self.size, self._good = max(1, min(self.size, size)), 0
