"""The loop that asks until the rows wanted are there: several calls at a time, each on disk before it counts."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import openai

from loraline.core.errors import LoralineError, failed_precondition, unavailable
from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.llms.endpoint import (
    Answer,
    BadRequest,
    Endpoint,
    Overloaded,
    QuotaReached,
    TimedOut,
    ask,
    unreachable,
)
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import CallRecord, Ledger, payload_digest
from loraline.datagen.llms.prompting import LlmSettings, payload
from loraline.datagen.llms.quota import QuotaNotice

TRIES_OF_ONE = 3
TRIES_WHEN_OVERLOADED = 5
SET_ASIDE_IN_A_ROW = 3
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Pace:
    """How hard an endpoint is worked: calls at a time, and the first pause of a back-off in seconds."""

    concurrency: int = 4
    backoff_seconds: float = 1.0
    stop_grace_seconds: float = 15.0


@dataclass
class _State:
    """Where the run stands."""

    next_call: int = 0
    batch: int = 10
    structured: bool = True
    sizes: dict[int, int] = field(default_factory=dict)
    again: list[int] = field(default_factory=list)
    aside_in_a_row: int = 0
    waited: float = 0.0
    waits: int = 0
    waited_for: set[str] = field(default_factory=set)


class LlmRun:
    """One source's rows from one endpoint."""

    def __init__(
        self, settings: LlmSettings, endpoint: Endpoint, ledger: Ledger, intake: Intake, seed: int,
        hooks: Hooks | None = None, pace: Pace | None = None,
    ):  # fmt: skip
        self._settings, self._endpoint, self._ledger, self._intake = settings, endpoint, ledger, intake
        self._seed, self._hooks, self._pace = seed, hooks or Hooks(), pace or Pace()
        self._state = _State(batch=settings.batch_size)
        self._budget = max(settings.rows, math.ceil(settings.rows * settings.max_candidates_ratio))

    async def run(self) -> None:
        """Ask until all rows are accepted; what the ledger holds is not asked again.

        JobPaused on a quota, LoralineError when the endpoint cannot be used or the candidates are used up.
        """
        self._replay()
        async with self._endpoint.client(self._settings.timeout_seconds) as client:
            running: dict[asyncio.Task[None], int] = {}
            try:
                while not self._intake.complete:
                    self._hooks.check_stop()
                    self._start_calls(running, client)
                    if not running:
                        raise self._too_slow() if self._state.aside_in_a_row >= SET_ASIDE_IN_A_ROW else self._used_up()
                    await asyncio.wait(running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    if self._hooks.stopping():
                        await self._finish(running)
                        self._hooks.check_stop()
                    notice = self._collect(running)
                    if notice is not None:
                        await self._finish(running)
                        await self._after(notice)
            except BaseException:
                await self._finish(running)
                raise
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _replay(self) -> None:
        for record in self._ledger.records:
            self._intake.take(record)
            self._state.next_call = max(self._state.next_call, record.call + 1)
            if record.outcome == "timeout":
                self._state.sizes[record.call] = max(1, record.size // 2)
            else:
                self._state.sizes.pop(record.call, None)
        # A call that only ever timed out is still owed an answer, at the size it had come down to.
        self._state.again.extend(sorted(self._state.sizes))
        self._hooks.progress(self._intake)

    def _start_calls(self, running: dict[asyncio.Task[None], int], client: openai.AsyncOpenAI) -> None:
        state = self._state
        while len(running) < self._pace.concurrency:
            in_flight = sum(running.values())
            missing = self._settings.rows - self._intake.accepted - in_flight
            left = self._budget - self._intake.candidates - in_flight
            if missing <= 0 or left <= 0 or state.aside_in_a_row >= SET_ASIDE_IN_A_ROW:
                return
            if state.again:
                call = state.again.pop(0)
            else:
                call, state.next_call = state.next_call, state.next_call + 1
            size = min(state.sizes.get(call, state.batch), missing, left)
            running[asyncio.create_task(self._call(client, call, size))] = size

    def _collect(self, running: dict[asyncio.Task[None], int]) -> QuotaNotice | None:
        """Clear the finished calls away; return the quota notice among them, if any. Other errors are raised."""
        notice: QuotaNotice | None = None
        failure: BaseException | None = None
        for task in [task for task in running if task.done()]:
            del running[task]
            error = task.exception()
            if isinstance(error, _Refused):
                self._state.again.append(error.call)
                notice = notice or error.notice
            elif error is not None:
                failure = failure or error
        if failure is not None:
            raise failure
        return notice

    def _record(self, record: CallRecord) -> None:
        """Write a call down and take it in, in one step: the order of the ledger is the order of the rows."""
        self._ledger.append(record)
        found = self._intake.take(record)
        state = self._state
        if record.outcome == "timeout":
            return
        state.sizes.pop(record.call, None)
        if record.outcome == "set_aside":
            state.aside_in_a_row += 1
        else:
            state.aside_in_a_row, state.waits, state.waited = 0, 0, 0.0
            state.waited_for.clear()
        if record.finish_reason == "length" and found < record.size:
            state.batch = max(1, min(state.batch, found))  # Ask for what fits instead of paying for cut items.
        self._hooks.progress(self._intake)

    async def _finish(self, running: dict[asyncio.Task[None], int]) -> None:
        """Let calls that are under way come back and be recorded: they are paid for."""
        if running:
            done, _ = await asyncio.wait(running, timeout=self._pace.stop_grace_seconds)
            for task in done:
                del running[task]
                error = task.exception()
                if isinstance(error, _Refused):
                    self._state.again.append(error.call)

    async def _call(self, client: openai.AsyncOpenAI, call: int, size: int) -> None:
        """Make one call, smaller after each time-out; the record is on disk when this returns."""
        timeouts = failures = 0
        while True:
            structured = self._state.structured
            body = payload(self._settings, self._endpoint.model, self._seed, call, size, structured=structured)
            digest = payload_digest(body)
            try:
                answer = await ask(client, self._endpoint, body)
                return self._record(_answered(call, size, digest, answer))
            except QuotaReached as error:
                raise _Refused(call, error.notice) from error
            except TimedOut:
                if size > 1:
                    self._record(CallRecord(call, size, digest, "timeout"))
                    size //= 2
                    self._state.sizes[call] = size
                    continue
                timeouts += 1
                if timeouts >= TRIES_OF_ONE:
                    return self._record(CallRecord(call, size, digest, "set_aside"))
                await asyncio.sleep(self._pace.backoff_seconds * 2**timeouts)
            except Overloaded as error:
                failures += 1
                if failures >= TRIES_WHEN_OVERLOADED:
                    raise unreachable(self._endpoint, str(error)) from error
                await asyncio.sleep(self._pace.backoff_seconds * 2 ** (failures - 1))
            except BadRequest as error:
                if not structured:
                    raise self._not_accepted(error) from error
                self._fall_back(error)

    def _fall_back(self, error: BadRequest) -> None:
        if self._state.structured:
            self._state.structured = False
            self._hooks.note(
                "STRUCTURED_OUTPUT_REFUSED", f"The endpoint refuses response_format ({error}); going on without it."
            )  # fmt: skip

    async def _after(self, notice: QuotaNotice) -> None:
        """Wait as the policy says, or raise JobPaused."""
        state, settings = self._state, self._settings
        wait = notice.wait_seconds
        if settings.quota_policy == "pause":
            raise self._paused(notice, wait)
        came_back = notice.quota_id and notice.quota_id in state.waited_for
        if notice.exhausted and (wait is None or came_back):
            raise self._paused(notice, wait)
        seconds = wait if wait is not None else min(60.0, self._pace.backoff_seconds * 2**state.waits)
        if state.waited + seconds > settings.max_wait_seconds:
            raise self._paused(notice, wait)
        self._hooks.note("QUOTA_WAIT", f"The endpoint is at its limit; waiting {seconds:.1f} s: {notice.message}")
        state.waits += 1
        state.waited += seconds
        state.waited_for.add(notice.quota_id)
        end = asyncio.get_running_loop().time() + seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            self._hooks.check_stop()
            await asyncio.sleep(min(POLL_SECONDS, left))

    def _paused(self, notice: QuotaNotice, wait: float | None) -> JobPaused:
        retry = datetime.now(UTC) + timedelta(seconds=wait) if wait is not None else None
        when = f" Trying again makes sense after {retry:%Y-%m-%d %H:%M:%S} UTC." if retry else ""
        return JobPaused(
            "QUOTA_EXHAUSTED",
            f"The endpoint {self._endpoint.name} is at its limit: {notice.message} {self._kept()}{when} "
            "Resume the job to go on where it stopped.", retry,
        )  # fmt: skip

    def _kept(self) -> str:
        return f"{self._intake.accepted} of {self._settings.rows} rows are kept."

    def _used_up(self) -> LoralineError:
        told = ", ".join(f"{count} {name}" for name, count in sorted(self._intake.outcomes.items())) or "no items"
        return failed_precondition(
            "LLM_CANDIDATES_EXHAUSTED",
            f"{self._intake.accepted} of {self._settings.rows} rows came out of {self._intake.candidates} candidates, "
            f"the most that max_candidates_ratio allows ({told}). Give more topics, personas or styles, a clearer "
            "brief, or a larger max_candidates_ratio.",
            accepted=str(self._intake.accepted), candidates=str(self._intake.candidates),
        )  # fmt: skip

    def _too_slow(self) -> LoralineError:
        return unavailable(
            "ENDPOINT_TIMEOUT",
            f"The endpoint {self._endpoint.name} did not answer within {self._settings.timeout_seconds:g} s, not even "
            f"for single items. {self._kept()} Set a longer request_timeout, or mend the endpoint, and resume the job.",
            endpoint=self._endpoint.name,
        )

    def _not_accepted(self, error: BadRequest) -> LoralineError:
        return failed_precondition(
            "ENDPOINT_REFUSED", f"The endpoint {self._endpoint.name} does not accept the request: {error}. Check "
            "model, max_tokens and temperature.", endpoint=self._endpoint.name,
        )  # fmt: skip


def _answered(call: int, size: int, digest: str, answer: Answer) -> CallRecord:
    return CallRecord(
        call, size, digest, "answered", answer.content, answer.finish_reason, answer.model, answer.prompt_tokens,
        answer.completion_tokens,
    )  # fmt: skip


class _Refused(Exception):
    """A call that a limit refused, to be made again."""

    def __init__(self, call: int, notice: QuotaNotice):
        super().__init__(notice.message)
        self.call, self.notice = call, notice
