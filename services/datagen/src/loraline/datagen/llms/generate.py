"""The loop that asks until the rows wanted are there: many calls at a time, each on disk before it counts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from loraline.core.errors import LoralineError
from loraline.datagen.llms.batch import BatchSize
from loraline.datagen.llms.budget import CostBudget
from loraline.datagen.llms.call import Call, Lost, Refused
from loraline.datagen.llms.endings import Endings
from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import CallRecord, Ledger
from loraline.datagen.llms.policy import QuotaPolicy
from loraline.datagen.llms.prompting import SHOWN, LlmSettings, Prompter
from loraline.datagen.llms.reuse import plan_of, reuse_answers
from loraline.datagen.llms.routes import LOST_FOR_GOOD, Pace, Route, Routes
from loraline.datagen.llms.texts import TextPlan

SET_ASIDE_IN_A_ROW = 3
POLL_SECONDS = 0.5


class LlmRun:
    """One source's rows from one or more endpoints, in order of preference."""

    def __init__(
        self, settings: LlmSettings, endpoints: Sequence[Endpoint], ledger: Ledger, intake: Intake, seed: int,
        hooks: Hooks | None = None, pace: Pace | None = None,
    ):  # fmt: skip
        self.settings, self.ledger, self.intake = settings, ledger, intake
        self.hooks, self.pace = hooks or Hooks(), pace or Pace()
        self.prompter = Prompter(settings, seed)
        self.batch = BatchSize(settings.batch_size)
        self.budget = CostBudget(settings.max_cost_usd)
        self._endpoints, self._seed = endpoints, seed
        self._endings = Endings(settings, intake, self.hooks)
        self._policy = QuotaPolicy(settings, self.hooks, self._endings.kept)
        self._plans = {one.place: plan_of(one, self.prompter.plan, intake.name) for one in endpoints}
        self.next_call = 0
        """Number of the next call that nobody has made yet."""
        texts = settings.texts
        self._plan = TextPlan(texts, settings.tries_of_a_text) if texts is not None else None
        self._again: deque[int] = deque()
        self._sizes: dict[int, int] = {}
        self._aside_in_a_row = 0
        self._asked = 0
        self._all_read = False
        self._running: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._woken = asyncio.Event()

    async def run(self) -> None:
        """Ask until all rows are accepted; what this ledger holds, or another job has paid for, is not asked again.

        JobPaused on a limit, a bound, or an endpoint that fails while there are rows to keep; LoralineError when no
        endpoint can be used or nothing came of the candidates.
        """
        self._replay()
        await self._reuse()
        if self.intake.complete:
            return
        routes = Routes(self._endpoints, self.pace, self.hooks, self.settings.timeout_seconds)
        try:
            await self._probe(routes)
            await self._ask_all(routes)
        finally:
            await self._finish()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            await routes.close()

    async def _reuse(self) -> None:
        taken = await reuse_answers(self)
        if taken:
            self.hooks.count("datagen_answers_reused", taken)
            self.hooks.note(
                "ANSWERS_REUSED", f"{taken} answers that earlier jobs paid for were taken over; {self._endings.kept()} "
                "Another seed asks for fresh ones.",
            )  # fmt: skip

    async def _probe(self, routes: Routes) -> None:
        try:
            await routes.probe()
        except LoralineError as error:
            raise self._endings.keeping(error) from error

    @property
    def plans(self) -> list[str]:
        """The plans of this run, one for each address and model."""
        return list(self._plans.values())

    def plan(self, endpoint: Endpoint) -> str:
        """Return the plan of the calls that this endpoint answers."""
        return self._plans[endpoint.place]

    def wake(self) -> None:
        """Let the loop look whether more calls can start."""
        self._woken.set()

    def _replay(self) -> None:
        for record in self.ledger.replay():
            self._take(record)
            self.next_call = max(self.next_call, record.call + 1)
            if record.outcome == "timeout":
                self._sizes[record.call] = max(1, record.size // 2)
            else:
                self._sizes.pop(record.call, None)
        # A call that only ever timed out is still owed an answer, at the size it had come down to.
        self._again.extend(sorted(self._sizes))
        self.hooks.progress(self.intake)

    async def _ask_all(self, routes: Routes) -> None:
        while not self.intake.complete:
            self.hooks.check_stop()
            self._woken.clear()
            self._start_calls(routes)
            if not self._running:
                await self._stuck(routes)
                continue
            await self._next_event()
            if self.hooks.stopping():
                await self._finish()
                self.hooks.check_stop()
            if self._failure is not None:
                await self._finish()
                raise self._failure

    async def _next_event(self) -> None:
        # Cheaper than asyncio.wait over hundreds of tasks: each ended call sets the event.
        timer = asyncio.get_running_loop().call_later(POLL_SECONDS, self._woken.set)
        await self._woken.wait()
        timer.cancel()

    # --------------------------------------------------------------------------------------------------- starting calls

    def room(self) -> int:
        """Return how many items may be asked for now."""
        missing = self.settings.rows - self.intake.accepted - self._asked
        left = self.intake.candidates_left - self._asked
        return 0 if self._aside_in_a_row >= SET_ASIDE_IN_A_ROW else min(missing, left)

    def _start_calls(self, routes: Routes) -> None:
        # Answers that wait for the disk hold no place at the endpoint, so they need a bound of their own.
        while (room := self.room()) > 0 and self.ledger.waiting <= 2 * self.pace.concurrency:
            spent, pauses = self.intake.cost, self.intake.budget_pauses
            if not self.budget.room(spent, pauses, len(self._running)):
                return
            route = routes.ready()
            if route is None:
                return
            number = self._number()
            if number is None:
                self._all_read = True
                return
            size = min(self._sizes.get(number, self.batch.size), room)
            self._asked += size
            task = asyncio.create_task(self._do(routes, route, number, size, route.limiter.begin()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _number(self) -> int | None:
        """Return the number of the next call, or None when every text was read or given up."""
        if self._again:
            return self._again.popleft()
        if self._plan is not None:
            return self._plan.next_call()
        self.next_call += 1
        return self.next_call - 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._woken.set()

    async def _do(self, routes: Routes, route: Route, number: int, size: int, started: float) -> None:
        call = Call(self, route, number, started)
        try:
            await call.make(size)
        except Refused as refused:
            route.refused(refused.notice, started)
            self._again.append(number)
        except Lost as lost:
            self._again.append(number)
            self._lose(routes, route, lost.error)
        except LoralineError as error:
            if error.reason in LOST_FOR_GOOD:
                self._again.append(number)
                self._lose(routes, route, error)
            else:
                self._failure = self._failure or self._endings.keeping(error)
        except Exception as error:
            self._failure = self._failure or error
        finally:
            call.free()
            self._asked -= size

    def _lose(self, routes: Routes, route: Route, error: LoralineError) -> None:
        routes.lose(route, error)
        if not routes.live:
            self._failure = self._failure or self._endings.keeping(error, routes.told(but_not=route))

    # ------------------------------------------------------------------------------------------------------- recording

    def context(self, number: int, size: int) -> list[str]:
        """Return the instructions that call `number` shows or rewrites."""
        mode = self.settings.recipe.context
        if self._plan is not None:
            return self._plan.question(number)
        if not mode:
            return []
        return self.intake.pool.draw(f"{self._seed}:{number}", SHOWN if mode == "examples" else size)

    async def record(self, record: CallRecord) -> None:
        """Write a call down, then take it in. Calls go on in the order of the ledger, so that is the rows' order."""
        await self.ledger.append(record)
        before = self.intake.outcomes.copy(), self.intake.accepted
        found = self._take(record)
        self._count_rows(*before)
        if record.outcome == "timeout":
            self._sizes[record.call] = max(1, record.size // 2)
            return
        self._sizes.pop(record.call, None)
        self._aside_in_a_row = self._aside_in_a_row + 1 if record.outcome == "set_aside" else 0
        if record.outcome == "answered":
            self._policy.answered()
            self.batch.answered(record.size, found, cut=record.finish_reason == "length")
        self.hooks.progress(self.intake)

    def _take(self, record: CallRecord) -> int:
        before = self.intake.accepted
        found = self.intake.take(record)
        if self._plan is not None and record.outcome not in ("timeout", "budget"):
            self._all_read = False
            self._plan.took(
                record.call, accepted=self.intake.accepted > before, final=record.outcome == "filtered"
            )  # fmt: skip
        return found

    def _count_rows(self, outcomes: dict[str, int], accepted: int) -> None:
        for name, count in self.intake.outcomes.items():
            if count > outcomes.get(name, 0):
                self.hooks.count("datagen_rows", count - outcomes.get(name, 0), outcome=name)
        if self.intake.accepted > accepted:
            self.hooks.count("datagen_rows", self.intake.accepted - accepted, outcome="accepted")

    # --------------------------------------------------------------------------------------------------------- stopping

    async def _finish(self) -> None:
        """Let calls that are under way come back and be recorded: they are paid for."""
        if self._running:
            await asyncio.wait(self._running, timeout=self.pace.stop_grace_seconds)

    async def _stuck(self, routes: Routes) -> None:
        """No call runs and none could start: say why, or wait until one can."""
        if self._failure is not None:
            raise self._failure
        if self._aside_in_a_row >= SET_ASIDE_IN_A_ROW:
            raise self._endings.too_slow(", ".join(dict.fromkeys(endpoint.name for endpoint in self._endpoints)))
        if self._plan is not None and self._all_read:
            raise self._plan.exhausted(self.intake.name, self.intake.accepted, self.settings.rows)
        if self.intake.candidates_left <= 0:
            end = self._endings.used_up()
            await self.record(CallRecord(-1, 0, "", "candidates"))
            raise end
        if not self.budget.room(self.intake.cost, self.intake.budget_pauses, 0):
            end = self._endings.budget_reached(self.budget.allowed(self.intake.budget_pauses))
            await self.record(CallRecord(-1, 0, "", "budget"))
            raise end
        if not routes.live:
            raise self._endings.keeping(routes.first_error) if routes.first_error else AssertionError
        await self._policy.wait(routes)
