"""Sees that the engine generates, not only that it exists; what died or hangs is started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

import structlog

from loraline.core.errors import LoralineError
from loraline.inference.config import InferenceSettings
from loraline.inference.engines.port import EngineDead
from loraline.inference.serving import Serving, generate_one_token

_log = structlog.get_logger(__name__)
_LOOK_SECONDS = 1.0
_STEADY_SECONDS = 60.0
"""An engine that lived this long was well: the next failure is a new one."""
_MAX_BACKOFF_SECONDS = 60.0
Failure = Literal["", "died", "hung"]
WHY = {
    "died": "The engine died",
    "hung": "The engine generated nothing any more",
}


class Backoff:
    """Waits that double up to a minute, and begin anew after a time without failure."""

    def __init__(self, first_seconds: float):
        self._first = first_seconds
        self._next = 0.0
        self._last = 0.0

    async def wait(self) -> None:
        """Wait before another try: not at all before the first in a while."""
        if time.monotonic() - self._last > _STEADY_SECONDS:
            self._next = 0.0
        if self._next:
            _log.warning("engine_restart_waits", seconds=self._next)
        await asyncio.sleep(self._next)
        self._next = min(self._next * 2 or self._first, _MAX_BACKOFF_SECONDS)
        self._last = time.monotonic()


class EngineWatch:
    """Looks at what is served every second, and has it generate a token where no request did so lately."""

    def __init__(
        self,
        settings: InferenceSettings,
        serving_now: Callable[[], Serving | None],
        restart: Callable[[Serving, Failure], Awaitable[None]],
    ):
        self._interval = settings.check_interval_seconds
        self._timeout = settings.check_timeout_seconds
        self._serving_now = serving_now
        self._restart = restart
        self._passed = 0.0

    async def keep(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, self._interval or _LOOK_SECONDS))
            serving = self._serving_now()
            if serving is None:
                continue
            failure = await self._failure(serving)
            if failure:
                await self._restart(serving, failure)

    async def _failure(self, serving: Serving) -> Failure:
        if not await serving.engine.healthy():
            return "died"
        last = max(self._passed, serving.last_token)
        if not self._interval or time.monotonic() - last < self._interval:
            return ""
        failure = await self._no_token(serving)
        if not failure:
            self._passed = time.monotonic()
        elif self._serving_now() is not serving:
            return ""  # replaced while it was looked at
        return failure

    async def _no_token(self, serving: Serving) -> Failure:
        """Wait for one token: of the check's own, or of any request, for the check queues up behind them."""
        begun = time.monotonic()
        checking = asyncio.ensure_future(generate_one_token(serving.engine, serving.chat_format))
        try:
            while time.monotonic() - begun < self._timeout:
                await asyncio.wait({checking}, timeout=min(_LOOK_SECONDS, self._timeout))
                if serving.last_token > begun:
                    return ""
                if checking.done():
                    return self._told(checking)
                if not await serving.engine.healthy():
                    return "died"
            return "hung"
        finally:
            checking.cancel()
            # Cancelling frees its slot; an engine that hangs must not hold us up here.
            with suppress(TimeoutError, asyncio.CancelledError, Exception):
                await asyncio.wait_for(asyncio.gather(checking, return_exceptions=True), _LOOK_SECONDS)

    @staticmethod
    def _told(checking: asyncio.Future[None]) -> Failure:
        error = checking.exception()
        if error is None:
            return ""
        _log.error("engine_check_failed", error=str(error))
        return "died" if isinstance(error, EngineDead | LoralineError) else "hung"
