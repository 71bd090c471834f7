"""One call of a run, from its request to its record: smaller after each time-out, again after what may pass."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

from loraline.core.errors import LoralineError, failed_precondition
from loraline.datagen.llms.asking import Answer, ask
from loraline.datagen.llms.failures import BadRequest, Filtered, Overloaded, QuotaReached, TimedOut, unreachable
from loraline.datagen.llms.ledger import CallRecord, Outcome, payload_digest
from loraline.datagen.llms.quota import QuotaNotice
from loraline.datagen.llms.routes import Route

if TYPE_CHECKING:
    from loraline.datagen.llms.generate import LlmRun

TRIES_OF_ONE = 3
TRIES_WHEN_OVERLOADED = 5
NOT_ACCEPTED_IN_A_ROW = 3
"""Requests that an endpoint may find fault with, one after the other, before it is the endpoint that is at fault."""


class Refused(Exception):
    """A limit refused the call; it is to be made again."""

    def __init__(self, notice: QuotaNotice):
        super().__init__(notice.message)
        self.notice = notice


class Lost(Exception):
    """The route does not answer any more; the call is to be made again, on another one or later."""

    def __init__(self, error: LoralineError):
        super().__init__(error.message)
        self.error = error


class Call:
    """Call number `number` on a route. When `make` returns its record is on disk."""

    def __init__(self, run: LlmRun, route: Route, number: int, started: float):
        self._run, self._route, self._number, self._started = run, route, number, started
        self._digest = ""
        self._holds = True
        self._timeouts = self._failures = 0

    async def make(self, size: int) -> None:
        """Ask for `size` items; Refused and Lost hand the call back, a LoralineError is final."""
        asked = size
        while True:
            structured = self._route.structured
            try:
                record = await self._ask(size, structured=structured)
            except QuotaReached as error:
                self._told("refused")
                raise Refused(error.notice) from error
            except TimedOut:
                smaller = await self._after_time_out(size)
                if smaller is None:
                    return None
                size = smaller
            except Overloaded as error:
                await self._after_failure(error)
            except BadRequest as error:
                self._told("bad_request")
                if structured and not self._route.proved:
                    self._go_unstructured(error)
                    continue
                self._set_aside(error)
                return await self._run.record(self._unanswered(size, "refused"))
            except Filtered:
                self._told("filtered")
                return await self._run.record(self._unanswered(size, "filtered"))
            else:
                if size < asked:
                    self._run.batch.came_down(size)
                return await self._run.record(record)

    def free(self) -> None:
        """Give the place at the endpoint back; once."""
        if self._holds:
            self._holds = False
            self._route.limiter.end()
            self._run.wake()

    async def _ask(self, size: int, *, structured: bool) -> CallRecord:
        run, endpoint = self._run, self._route.endpoint
        context = run.context(self._number, size)
        body = run.prompter.body(endpoint.model, self._number, size, structured=structured, context=context)
        self._digest = payload_digest(body)
        known = run.ledger.find(self._digest)
        if known is not None:  # Paid for already: neither asked nor counted as tokens again.
            self._told("known")
            return dataclasses.replace(
                known, call=self._number, size=size, prompt_tokens=0, completion_tokens=0, cost=0.0
            )  # fmt: skip
        begin = time.monotonic()
        try:
            answer = await ask(self._route.transport, endpoint, body)
        except LoralineError as error:
            if self._route.proved and error.reason == "ENDPOINT_NOT_FOUND":
                raise Overloaded(error.message) from error  # It has answered before: a page of some gateway in between.
            raise
        self._route.answered()
        if self._route.limiter.in_force > 1:
            self.free()  # The endpoint need not wait for our disk.
        self._told("answered", time.monotonic() - begin, answer)
        cost = run.budget.note(answer.cost, endpoint)
        return CallRecord(
            self._number, size, self._digest, "answered", answer.content, answer.finish_reason, answer.model,
            answer.prompt_tokens, answer.completion_tokens, cost, endpoint.name, run.plan(endpoint), time.time(),
        )  # fmt: skip

    def _told(self, result: str, seconds: float = 0.0, answer: Answer | None = None) -> None:
        hooks, labels = self._run.hooks, self._route.labels
        hooks.count("datagen_requests", 1, result=result, **labels)
        if answer is None:
            return
        hooks.count("datagen_request_seconds", seconds, **labels)
        hooks.count("datagen_tokens", answer.prompt_tokens, direction="in", **labels)
        hooks.count("datagen_tokens", answer.completion_tokens, direction="out", **labels)
        if answer.cost:
            hooks.count("datagen_cost_usd", answer.cost, **labels)
        hooks.gauge("datagen_batch_size", self._run.batch.size, **labels)
        hooks.gauge("datagen_concurrency", self._route.limiter.in_force, **labels)

    async def _after_time_out(self, size: int) -> int | None:
        """Record the time-out and return the next size to ask for; None when the call was set aside."""
        self._told("timeout")
        self._route.congested(self._started)
        if size > 1:
            await self._run.record(self._unanswered(size, "timeout"))
            return size // 2
        self._timeouts += 1
        if self._timeouts >= TRIES_OF_ONE:
            await self._run.record(self._unanswered(size, "set_aside"))
            return None
        await asyncio.sleep(self._run.pace.backoff_seconds * 2**self._timeouts)
        return size

    async def _after_failure(self, error: Overloaded) -> None:
        self._told("failed")
        self._route.congested(self._started)
        self._failures += 1
        if self._failures >= TRIES_WHEN_OVERLOADED:
            raise Lost(unreachable(self._route.endpoint, str(error))) from error
        await asyncio.sleep(self._run.pace.backoff_seconds * 2 ** (self._failures - 1))

    def _unanswered(self, size: int, outcome: Outcome) -> CallRecord:
        return CallRecord(self._number, size, self._digest, outcome, endpoint=self._route.endpoint.name)

    def _go_unstructured(self, error: BadRequest) -> None:
        if self._route.structured:
            self._route.structured = False
            self._run.hooks.note(
                "STRUCTURED_OUTPUT_REFUSED", f"The endpoint {self._route.endpoint.name} refuses response_format "
                f"({error}); going on without it.",
            )  # fmt: skip

    def _set_aside(self, error: BadRequest) -> None:
        """Note that this request is not accepted; a LoralineError when none is, not only this one."""
        self._route.not_accepted += 1
        if self._route.not_accepted >= NOT_ACCEPTED_IN_A_ROW:
            raise self._not_accepted(error) from error
        if self._run.intake.outcomes["refused"] == 0:
            self._run.hooks.note(
                "REQUEST_SET_ASIDE", f"The endpoint {self._route.endpoint.name} does not accept one request ({error}); "
                "it is set aside. Further ones are counted as `refused`.",
            )  # fmt: skip

    def _not_accepted(self, error: BadRequest) -> LoralineError:
        name = self._route.endpoint.name
        return failed_precondition(
            "ENDPOINT_REFUSED", f"The endpoint {name} does not accept the request: {error}. Check model, max_tokens "
            "and temperature.", endpoint=name,
        )  # fmt: skip
