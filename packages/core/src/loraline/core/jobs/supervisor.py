"""One claimed job's process: started, kept alive in the database, stopped when asked, and its end told."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import structlog

from loraline.api.job.v1 import job_pb2
from loraline.core import tracing
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.jobs import endings
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.model import QUEUED, Claim, LeaseLost, state_name, warning
from loraline.core.jobs.observer import JobObserver
from loraline.core.jobs.patience import patiently
from loraline.core.jobs.payload import ChildPayload, settings_secrets, settings_to_json
from loraline.core.jobs.table import JobTable
from loraline.core.jobs.telemetry import TelemetryPipe
from loraline.core.jobs.workdir import begin_log, job_folder, log_tail

_log = structlog.get_logger("loraline.job")
_LOOK_SECONDS = 0.1
_T = TypeVar("_T")
EventSink = Callable[[str, Mapping[str, object]], None]
"""Told what a runner does, for its log: an event's name and its facts."""

_held_here: set[str] = set()


def held_here() -> frozenset[str]:
    """Return the names of the jobs that runners of this process watch over now."""
    return frozenset(_held_here)


class Supervisor(threading.Thread):
    """Runs a claimed job in a child process group, on a thread of its own.

    The thread waits for the process, so it never stalls with the server's event loop, and it outlives the child: on
    Linux the child's death signal follows the thread that started it.
    """

    def __init__(
        self,
        settings: CoreSettings,
        table: JobTable,
        handler: JobHandler,
        claim: Claim,
        *,
        observer: JobObserver,
        on_event: EventSink,
        on_end: Callable[[Supervisor], None],
    ):
        super().__init__(name=f"job-{claim.name}", daemon=True)
        self.claim = claim
        self._settings, self._table, self._handler = settings, table, handler
        self._observer, self._on_event, self._on_end = observer, on_event, on_end
        self._handover = threading.Event()
        self._wish = ""
        self._lease_lost = False
        self._term_at: float | None = None
        self._killed = False
        self.pid = 0
        """Process id of the child, which leads its group; 0 before it runs."""

    def hand_over(self) -> None:
        """Ask the child to checkpoint and stop, so that another runner may go on."""
        self._handover.set()

    def run(self) -> None:
        """Do the job; never raises. The trace's span is the runner's, so it tells of processes that were killed too."""
        claim = self.claim
        facts = {"loraline.job": claim.name, "loraline.kind": claim.kind, "loraline.attempt": claim.attempt}
        facts["loraline.queue_seconds"] = round(claim.queue_seconds, 3)
        parent = tracing.from_text(claim.trace)
        try:
            with tracing.span(f"job {claim.kind}", kind="consumer", parent=parent, attributes=facts) as span:
                state = self._attempt()
                span.set_attribute("loraline.state", state)
                if state in ("", "FAILED"):
                    span.fail("the job failed" if state else "the job could not be supervised")
        finally:
            self._on_end(self)

    def _attempt(self) -> str:
        """Return the state that the attempt led to; empty when that is not known."""
        begin = time.monotonic()
        self._observer.job_started(self.claim.kind, self.claim.queue_seconds)
        state = ""
        _held_here.add(self.claim.name)
        try:
            folder = job_folder(self._settings.data_dir, self.claim.name)
            code = self._run_child(folder)
            state = self._conclude(code, folder)
        except Exception as error:  # the lease runs out then, and the job is taken up again
            self._tell("job_supervision_failed", error=f"{type(error).__name__}: {error}")
        finally:
            _held_here.discard(self.claim.name)
            self._observer.job_finished(self.claim.kind, state or "UNKNOWN", time.monotonic() - begin)
            self._tell("job_left", state=state)
        return state

    # ---------------------------------------------------------------------------------------------------------- child

    def _run_child(self, folder: Path) -> int:
        log = begin_log(folder, self.claim.attempt)
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", "loraline.core.jobs.child"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        pipe = TelemetryPipe()
        try:
            with log.open("wb") as output:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(pipe.child_end,),
                )
            return self._attend(child, pipe)
        finally:
            pipe.close()
            self._observer.job_gone(self.claim.kind, self.claim.name)

    def _attend(self, child: subprocess.Popen[bytes], pipe: TelemetryPipe) -> int:
        self.pid = child.pid
        self._tell("job_started", pid=child.pid)
        try:
            self._send_payload(child, pipe.child_end)
            pipe.close_child_end()
            return self._watch(child, pipe)
        finally:
            _kill_group(child.pid)  # what it left behind: workers, launchers, the guardian
            child.wait()
            self._listen(pipe)
            _reap_group(child.pid)
            if child.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()

    def _listen(self, pipe: TelemetryPipe) -> None:
        for figures in pipe.take():
            self._observer.job_told(self.claim.kind, self.claim.name, figures)
        for remark in pipe.take_remarks():
            level = logging.getLevelNamesMapping().get(str(remark.pop("level", "")).upper(), logging.INFO)
            event, source = str(remark.pop("event", "")), remark.pop("logger", "")
            whose = {"kind": self.claim.kind, "attempt": self.claim.attempt, "source": source}
            _log.log(level, event, **{**remark, **self._whose(), **whose})

    def _send_payload(self, child: subprocess.Popen[bytes], telemetry: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead already; its return code says more
            if child.stdin is not None:
                child.stdin.write(self._payload(telemetry).to_line())
                child.stdin.flush()

    def _payload(self, telemetry: int) -> ChildPayload:
        request = self._handler.request_type
        return ChildPayload(
            job=self.claim.name,
            kind=self.claim.kind,
            epoch=self.claim.epoch,
            attempt=self.claim.attempt,
            entry=self._handler.entry,
            request_type=f"{request.__module__}:{request.__qualname__}",
            runner_pid=os.getpid(),
            settings=settings_to_json(self._settings),
            telemetry_fd=telemetry,
            trace=tracing.carrier(),
        )

    def _watch(self, child: subprocess.Popen[bytes], pipe: TelemetryPipe) -> int:
        """Wait for the child's end; keep the lease, pass on its figures, and wishes to stop."""
        beat_every = self._settings.lease_seconds / 3
        next_beat, next_poll = time.monotonic() + beat_every, 0.0
        while True:
            try:
                return child.wait(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            self._listen(pipe)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + beat_every
                self._ask(lambda: self._table.heartbeat(*self._held, self._settings.lease_seconds))
            elif now >= next_poll and not self._wish:
                next_poll = now + self._settings.poll_seconds
                self._ask(lambda: self._table.requested_stop(*self._held))
            self._stop_if_asked(child, now)

    @property
    def _held(self) -> tuple[str, int]:
        return self.claim.name, self.claim.epoch

    def _ask(self, question: Callable[[], str]) -> None:
        try:
            self._wish = question() or self._wish
        except LeaseLost:
            self._lease_lost = True
        except LoralineError as error:
            # Out of reach is not out of the race: if another takes the job meanwhile, the next beat will say so.
            self._tell("job_heartbeat_failed", error=str(error))

    def _stop_if_asked(self, child: subprocess.Popen[bytes], now: float) -> None:
        if self._lease_lost:
            # Either the child wrote its end and is about to exit, or another runner has the job. One more look.
            try:
                child.wait(timeout=min(2.0, self._settings.stop_grace_seconds))
            except subprocess.TimeoutExpired:
                self._tell("job_lease_lost")
                _kill_group(child.pid)
            return
        if not (self._wish or self._handover.is_set()):
            return
        if self._term_at is None:
            self._term_at = now
            self._tell("job_stopping", cause=self._wish or "handover")
            # Only the leader: its workers would die before it could save what they work on.
            child.send_signal(signal.SIGTERM)
        elif now - self._term_at > self._settings.stop_grace_seconds and not self._killed:
            self._killed = True
            _kill_group(child.pid)

    # ------------------------------------------------------------------------------------------------------------ end

    def _conclude(self, code: int, folder: Path) -> str:
        """Write how the child ended, unless it did so itself; return the job's state now."""
        with contextlib.suppress(LeaseLost):  # the usual case: the child wrote its end
            self._patiently(lambda: self._write_end(code, folder))
        head = self._patiently(lambda: self._table.heads([self.claim.name])).get(self.claim.name)
        return state_name(head[1]) if head else "DELETED"

    def _write_end(self, code: int, folder: Path) -> object:
        if self._term_at is None:
            note = endings.death_note(code, log_tail(folder, settings_secrets(self._settings)))
            state = self._table.lost(*self._held, note, self._settings.max_attempts)
            return self._tell("job_process_lost", code=code, state=state_name(state))
        note = self._hard_stop_note() if self._killed else None
        end = endings.stopped(self.claim.name, self._wish, note)
        if end.state == QUEUED:
            if note is not None:
                self._table.note(*self._held, note)
            return self._table.release(*self._held)
        return self._table.finish(*self._held, end)

    def _hard_stop_note(self) -> job_pb2.Note:
        grace = self._settings.stop_grace_seconds
        text = f"The job did not stop within {grace:g} s and was killed; what it had not saved is lost."
        return warning("STOPPED_HARD", text, remedy="Raise LORALINE_STOP_GRACE_SECONDS.")

    def _patiently(self, write: Callable[[], _T]) -> _T:
        return patiently(write, self._settings.lease_seconds)

    def _tell(self, event: str, **facts: object) -> None:
        self._on_event(event, {**self._whose(), "epoch": self.claim.epoch, **facts})

    def _whose(self) -> dict[str, object]:
        """Return what every line says: the job, and its labels, of which the run's name is one."""
        labels = {"labels": self.claim.labels} if self.claim.labels else {}
        return {"job": self.claim.name, **labels}


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone; macOS says EPERM for zombies
        os.killpg(group, signal.SIGKILL)


def _reap_group(group: int) -> None:
    """Collect members of a killed group that became this process's children, as orphans do when it is process 1."""
    with contextlib.suppress(ChildProcessError):  # there are none, the usual case
        for _ in range(100):
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
