"""A pause between two deliveries of one answer: tokens that come meanwhile go out as one message.

A message costs a Python server tens of microseconds whether it carries one token or twenty. vLLM's front merges what
it has for a reader that is away, so a reader that rests for some milliseconds is all it takes. Streams slower than the
pause never rest: their next token comes later than that anyway. All answers go on at the same ticks of the clock, so
that one timer serves them all and the messages of one connection leave together. Where ticks come late, the event loop
has more to do than it can, and the pause grows until it catches up: tokens wait for their turn then in any case.
"""

from __future__ import annotations

import asyncio
import math
from weakref import WeakKeyDictionary

_LONGEST = 16.0
"""Most that a pause grows, as a multiple of what was set."""


class Pace:
    """Lets one answer deliver once in each `seconds` of the clock; the first is not held up. 0 for no pause."""

    __slots__ = ("_loop", "_next", "_ticker")

    def __init__(self, seconds: float):
        self._loop = asyncio.get_running_loop()
        self._ticker = _ticker(self._loop, seconds) if seconds else None
        self._next = 0.0

    def delivered(self) -> None:
        """Note that something has come and is about to be given out."""
        if self._ticker is not None:
            self._next = self._ticker.after(self._loop.time())

    async def rest(self) -> None:
        """Wait for the tick after the last delivery; returns at once where that has passed."""
        if self._ticker is not None and self._next > self._loop.time():
            await self._ticker.wait(self._loop, self._next)


class _Ticker:
    """The ticks of one event loop, and who waits for them; knows the loop only while somebody does."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        """Between two ticks now."""
        self._least, self._most = seconds, seconds * _LONGEST
        self._waiting: dict[float, list[asyncio.Future[None]]] = {}

    def after(self, now: float) -> float:
        """Return the first tick after a time."""
        return (math.floor(now / self.seconds) + 1) * self.seconds

    def wait(self, loop: asyncio.AbstractEventLoop, tick: float) -> asyncio.Future[None]:
        """Return a future of the caller's own that is done at a tick."""
        waiters = self._waiting.get(tick)
        if waiters is None:
            waiters = self._waiting[tick] = []
            loop.call_at(tick, self._go_on, loop, tick)
        future = loop.create_future()
        waiters.append(future)
        return future

    def _go_on(self, loop: asyncio.AbstractEventLoop, tick: float) -> None:
        self.adapt(loop.time() - tick)
        for future in self._waiting.pop(tick):
            if not future.done():  # cancelled where its client went away
                future.set_result(None)

    def adapt(self, late: float) -> None:
        """Lengthen or shorten the pause by how late a tick came."""
        if late > self.seconds / 2:
            self.seconds = min(self.seconds * 2, self._most)
        elif late < self.seconds / 4:
            self.seconds = max(self.seconds / 2, self._least)


_tickers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[float, _Ticker]] = WeakKeyDictionary()


def _ticker(loop: asyncio.AbstractEventLoop, seconds: float) -> _Ticker:
    """Return the ticker that all answers of a loop share."""
    of_loop = _tickers.setdefault(loop, {})
    if seconds not in of_loop:
        of_loop[seconds] = _Ticker(seconds)
    return of_loop[seconds]
