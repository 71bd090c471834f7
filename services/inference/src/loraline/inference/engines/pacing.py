"""A pause between two deliveries of one answer: tokens that come meanwhile go out as one message.

A message costs a Python server tens of microseconds whether it carries one token or twenty. vLLM's front merges what
it has for a reader that is away, so a reader that rests for some milliseconds is all it takes. Streams slower than the
pause never rest: their next token comes later than that anyway.
"""

from __future__ import annotations

import asyncio


class Pace:
    """Keeps deliveries of one answer at least `seconds` apart; the first is not held up. 0 for no pause."""

    __slots__ = ("_earliest", "_loop", "_seconds")

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._earliest = 0.0

    def delivered(self) -> None:
        """Note that something has come and is about to be given out."""
        self._earliest = self._loop.time() + self._seconds

    async def rest(self) -> None:
        """Wait until the next delivery may be taken; returns at once where it already may."""
        left = self._earliest - self._loop.time()
        if left > 0:
            await asyncio.sleep(left)
