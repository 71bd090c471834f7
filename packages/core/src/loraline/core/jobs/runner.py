"""Claims queued jobs and has them done, as many at a time as the settings allow."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence

import structlog

from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.model import state_name
from loraline.core.jobs.observer import JobObserver, NoObserver
from loraline.core.jobs.supervisor import EventSink, Supervisor, held_here
from loraline.core.jobs.table import JobTable

_QUEUE_STATE_SECONDS = 5.0


class JobRunner:
    """The runner of one stage in one process.

    `start` begins to claim jobs of the handlers' kinds; `drain` stops that, lets running jobs checkpoint, hands their
    leases back and returns when no child is left. Any number of runners, on any number of machines, may share a table.
    """

    def __init__(
        self,
        settings: CoreSettings,
        table: JobTable,
        handlers: Sequence[JobHandler],
        on_event: EventSink | None = None,
        *,
        observer: JobObserver | None = None,
    ):
        self._settings, self._table = settings, table
        self._handlers = {handler.kind: handler for handler in handlers}
        self._on_event = on_event or _log_event
        self._observer = observer or NoObserver()
        self.owner = f"{socket.gethostname()[:80]}:{os.getpid()}:{secrets.token_hex(4)}"
        """Name of this runner in leases: host, process, and a random part."""
        self._active: set[Supervisor] = set()
        self._draining = False
        self._woken = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._queue_told_at = 0.0
        self._unsubscribe = lambda: None

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the jobs that run here now."""
        return tuple(supervisor.claim.name for supervisor in tuple(self._active))

    @property
    def child_pids(self) -> dict[str, int]:
        """Process ids of the children by job name."""
        return {supervisor.claim.name: supervisor.pid for supervisor in tuple(self._active) if supervisor.pid}

    async def start(self) -> None:
        """Begin to claim jobs."""
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = self._table.on_queued(self.wake)
        self._task = asyncio.create_task(self._poll(), name="job-runner")

    def wake(self) -> None:
        """Look for jobs now rather than at the next poll; may be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def drain(self) -> None:
        """Claim no more, stop the children with cause `handover`, and wait until all are gone.

        A child that does not stop within stop_grace_seconds is killed; its job is QUEUED again all the same.
        """
        self._draining = True
        self._unsubscribe()
        self.wake()
        if self._task is not None:
            await self._task
        for supervisor in tuple(self._active):
            supervisor.hand_over()
        for supervisor in tuple(self._active):
            await asyncio.to_thread(supervisor.join)

    async def _poll(self) -> None:
        while not self._draining:
            self._woken.clear()
            try:
                await asyncio.to_thread(self._look)
            except LoralineError as error:
                self._on_event("runner_waits_for_database", {"error": str(error)})
            except Exception as error:  # a runner that ends silently would leave a server that takes jobs and does none
                self._on_event("runner_failed", {"error": f"{type(error).__name__}: {error}"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._settings.poll_seconds)

    def _look(self) -> None:
        # Not what this process itself watches over: after a laptop's sleep the lease has run out, the child has not.
        for takeover in self._table.reap(self._settings.max_attempts, keep=held_here()):
            self._observer.lease_takeover(takeover.kind)
            self._on_event("lease_taken_over", {"job": takeover.name, "state": state_name(takeover.state)})
        while not self._draining and len(self._active) < self._settings.max_concurrent_jobs:
            claim = self._table.claim(list(self._handlers), self.owner, self._settings.lease_seconds)
            if claim is None:
                break
            supervisor = Supervisor(
                self._settings,
                self._table,
                self._handlers[claim.kind],
                claim,
                observer=self._observer,
                on_event=self._on_event,
                on_end=self._ended,
            )
            self._active.add(supervisor)
            supervisor.start()
        if time.monotonic() - self._queue_told_at >= _QUEUE_STATE_SECONDS:
            self._queue_told_at = time.monotonic()
            for state in self._table.queue_states():
                if state.kind in self._handlers:
                    self._observer.queue_state(state)

    def _ended(self, supervisor: Supervisor) -> None:
        self._active.discard(supervisor)
        self.wake()


def _log_event(event: str, facts: Mapping[str, object]) -> None:
    bad = event.endswith(("_failed", "_lost", "_database"))
    logger = structlog.get_logger("loraline.jobs")
    (logger.warning if bad else logger.info)(event, **facts)
