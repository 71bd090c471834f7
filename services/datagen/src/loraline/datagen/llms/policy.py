"""What to do at a limit: go slower, wait, or pause the job with everything kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.routes import Route, Routes

LOOK_SECONDS = 0.5


class QuotaPolicy:
    """Decides when no route takes a call. `kept` tells how many rows there are."""

    def __init__(self, settings: LlmSettings, hooks: Hooks, kept: Callable[[], str]):
        self._settings, self._hooks, self._kept = settings, hooks, kept
        self._waited = 0.0
        self._waited_for: set[str] = set()

    def answered(self) -> None:
        """Note an answer: the waits before it were worth it."""
        if self._waited_for or self._waited:
            self._waited = 0.0
            self._waited_for.clear()

    async def wait(self, routes: Routes) -> None:
        """Wait until a route may be tried again; JobPaused when the policy, or the kind of limit, says so."""
        resting = [route for route in routes.live if route.notice is not None and route.rests_for > 0]
        if not resting:  # Other jobs use what the endpoint takes, or a break of theirs has to pass.
            await self._sleep(min([LOOK_SECONDS, *(route.limiter.opens_in or LOOK_SECONDS for route in routes.live)]))
            return
        # One that waiting helps comes before one that it does not help, however soon that may be tried again.
        soonest = min(resting, key=lambda route: (not self._may_wait(route), route.rests_for))
        seconds = soonest.rests_for
        if soonest.slowing:
            await self._sleep(seconds)
            soonest.wake()
            return
        if not self._may_wait(soonest):
            raise self._paused(routes, resting)
        notice = soonest.notice
        said = notice.message if notice else ""
        self._hooks.note("QUOTA_WAIT", f"The endpoint is at its limit; waiting {seconds:.1f} s: {said}")
        self._waited += seconds
        self._waited_for.add(notice.quota_id if notice else "")
        await self._sleep(seconds)
        soonest.wake()

    def _may_wait(self, route: Route) -> bool:
        notice = route.notice
        if notice is None or route.slowing:
            return True
        came_back = bool(notice.quota_id) and notice.quota_id in self._waited_for
        hopeless = notice.exhausted and (notice.wait_seconds is None or came_back)
        too_long = self._waited + route.rests_for > self._settings.max_wait_seconds
        return not (self._settings.quota_policy == "pause" or hopeless or too_long)

    def _paused(self, routes: Routes, resting: Sequence[Route]) -> JobPaused:
        """Return the pause, with what every route said and the earliest time that any of them told."""
        timed = [route for route in resting if route.notice and route.notice.wait_seconds is not None]
        first = min(timed or resting, key=lambda route: route.rests_for)
        notice = first.notice
        if notice is None:
            raise AssertionError
        retry = datetime.now(UTC) + timedelta(seconds=first.rests_for) if timed else None
        when = f" Trying again makes sense after {retry:%Y-%m-%d %H:%M:%S} UTC." if retry else ""
        self._hooks.count("datagen_pauses", 1, reason=notice.reason, **first.labels)
        others = routes.told(but_not=first)
        return JobPaused(
            notice.reason,
            f"The endpoint {first.endpoint.name} is at its limit: {notice.message} {others + ' ' if others else ''}"
            f"{self._kept()}{when} To go on: {self._hooks.go_on}", retry,
        )  # fmt: skip

    async def _sleep(self, seconds: float) -> None:
        self._hooks.count("datagen_waiting_seconds", seconds)
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            self._hooks.check_stop()
            await asyncio.sleep(min(LOOK_SECONDS, left))
