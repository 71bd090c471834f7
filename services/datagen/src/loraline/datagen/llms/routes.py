"""The ways to a model: each endpoint with each of its keys, in order of preference, and how each one fares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraline.core.errors import LoralineError
from loraline.datagen.llms.endpoint import Endpoint, probe
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.limiter import Limiter
from loraline.datagen.llms.limits import LimitFile, LimitMemory
from loraline.datagen.llms.quota import QuotaNotice
from loraline.datagen.llms.transport import Transport, open_transport

SHORT_WAIT_SECONDS = 5.0
LOST_FOR_GOOD = frozenset(
    {"ENDPOINT_KEY_REFUSED", "ENDPOINT_MODEL_NOT_FOUND", "ENDPOINT_NOT_FOUND", "ENDPOINT_REFUSED", "ENDPOINT_PROXY"}
)
LIMITS = frozenset({"QUOTA_EXHAUSTED", "MODEL_COOLDOWN", "RATE_LIMITED"})
UNLISTED = frozenset({"ENDPOINT_NOT_FOUND"})
"""What a list of models may fail with although the endpoint answers chats: the first call tells."""


@dataclass(frozen=True)
class Pace:
    """How hard endpoints are worked.

    `concurrency`: most calls at a time for an endpoint, model and key, of all jobs together. `backoff_seconds`: first
    pause of a back-off. `limits_folder`: where the jobs of a service share their limits; None for this process alone.
    `probe_seconds`: how long an endpoint may take to list its models before the first call; 0 does not ask.
    """

    concurrency: int = 4
    backoff_seconds: float = 1.0
    stop_grace_seconds: float = 15.0
    limits_folder: Path | None = None
    probe_seconds: float = 0.0


class Route:
    """One endpoint with one key, while a run uses it."""

    def __init__(self, endpoint: Endpoint, pace: Pace, hooks: Hooks, timeout_seconds: float):
        self.endpoint, self._pace, self._hooks = endpoint, pace, hooks
        folder, most = pace.limits_folder, pace.concurrency
        store = LimitFile(folder, endpoint.limit_key, most) if folder else LimitMemory(most)
        self.limiter = Limiter(store, most)
        self.transport: Transport = open_transport(endpoint, timeout_seconds)
        self.structured = True
        self.proved = False
        self.not_accepted = 0
        """Requests in a row that the endpoint did not accept."""
        self.notice: QuotaNotice | None = None
        self.slowing = False
        """Whether going slower is the answer to the last refusal, not waiting for a quota."""
        self.lost: LoralineError | None = None
        self._rests_until = 0.0
        self._refusals = 0

    @property
    def labels(self) -> dict[str, str]:
        """Labels of this route's metrics."""
        return {"endpoint": self.endpoint.name, "model": self.endpoint.model}

    @property
    def rests_for(self) -> float:
        """Seconds until a refusal has been waited out; 0 when there is none."""
        return max(0.0, self._rests_until - time.monotonic())

    @property
    def told(self) -> str:
        """Why this route takes no calls, for people; empty when it does."""
        key = f" (key {self.endpoint.key_number})" if self.endpoint.key_number > 1 else ""
        if self.lost is not None:
            return f"{self.endpoint.name}{key} is lost: {self.lost.message}"
        if self.notice is None:
            return ""
        return f"{self.endpoint.name}{key} is at its limit ({self.notice.reason}): {self.notice.message}"

    def ready(self) -> bool:
        """Return whether a call may start here now."""
        return self.lost is None and not self.rests_for and self.limiter.free()

    def answered(self) -> None:
        """Note an answer."""
        self.proved, self.notice, self.slowing, self._refusals, self.not_accepted = True, None, False, 0, 0
        self.limiter.succeeded()

    def refused(self, notice: QuotaNotice, started: float) -> None:
        """Note a limit: rest as told, or for a back-off that grows."""
        self._refusals += 1
        told = notice.wait_seconds
        backoff = min(60.0, self._pace.backoff_seconds * 2 ** min(self._refusals - 1, 10))
        slower = self.limiter.refused(started, 0.0 if told is None else told)
        short = told is None or told <= SHORT_WAIT_SECONDS
        self.slowing = notice.kind in ("rate", "overloaded") and slower and short
        self.notice = notice
        self._rests_until = time.monotonic() + (backoff if told is None else told)
        self._hooks.count("datagen_quota_errors", 1, reason=notice.kind, **self.labels)
        self._hooks.gauge("datagen_concurrency", self.limiter.in_force, **self.labels)

    def congested(self, started: float) -> None:
        """Note a time-out or a failure under load: fewer calls at a time."""
        self.limiter.refused(started)
        self._hooks.gauge("datagen_concurrency", self.limiter.in_force, **self.labels)

    def give_up(self, error: LoralineError) -> None:
        """Use this route no more in this run."""
        self.lost = error

    def wake(self) -> None:
        """End the rest; the next call goes first and alone."""
        self._rests_until = 0.0
        self.limiter.go_alone()

    async def close(self) -> None:
        """Give the limit's share back and close the connections."""
        self.limiter.leave()
        await self.transport.close()


class Routes:
    """All routes of a run, in order of preference."""

    def __init__(self, endpoints: Sequence[Endpoint], pace: Pace, hooks: Hooks, timeout_seconds: float):
        self._all = [Route(endpoint, pace, hooks, timeout_seconds) for endpoint in endpoints]
        self._pace, self._hooks = pace, hooks

    async def probe(self) -> None:
        """Ask each endpoint for its models. One that fails is left out while another works; else its error is raised.

        A limit that refuses even the list, or an endpoint that has no list, is no failure: the first call will tell.
        """
        if self._pace.probe_seconds <= 0:
            return
        for route in self._all:
            if not route.endpoint.lists_models:
                continue
            try:
                await probe(route.endpoint, self._pace.probe_seconds)
            except LoralineError as error:
                if error.reason not in LIMITS | UNLISTED:
                    self.lose(route, error)
        if not self.live:
            raise self._all[0].lost or AssertionError

    def lose(self, route: Route, error: LoralineError) -> None:
        """Leave a route out; where others are left, a note says so."""
        route.give_up(error)
        if self.live:
            self._hooks.note(error.reason, f"Going on without an endpoint: {error.message}")

    def told(self, but_not: Route | None = None) -> str:
        """Say of every route, one aside, why it takes no calls."""
        return " ".join(_sentence(route.told) for route in self._all if route is not but_not and route.told)

    @property
    def live(self) -> list[Route]:
        """The routes that are not lost."""
        return [route for route in self._all if route.lost is None]

    @property
    def first_error(self) -> LoralineError | None:
        """Why the preferred route was lost."""
        return next((route.lost for route in self._all if route.lost is not None), None)

    def ready(self) -> Route | None:
        """Return the preferred route that takes a call now. Others stand in only while it rests or is lost."""
        for route in self.live:
            if route.ready():
                return route
            if not route.rests_for and not route.limiter.opens_in:
                return None  # It is busy, not down.
        return None

    async def close(self) -> None:
        """Close all."""
        for route in self._all:
            await route.close()


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
