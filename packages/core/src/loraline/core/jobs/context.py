"""What a job's code sees of the platform, inside the job's own process."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.errors import LoralineError, invalid_argument
from loraline.core.jobs.handlers import StopRequested
from loraline.core.jobs.loading import StopSignal
from loraline.core.jobs.model import LeaseLost, warning
from loraline.core.jobs.outputs import published_before
from loraline.core.jobs.pacing import EventPace, share
from loraline.core.jobs.patience import patiently
from loraline.core.jobs.table import JobTable
from loraline.core.jobs.telemetry import TelemetryWriter

if TYPE_CHECKING:
    from loraline.core.artifacts.library import ArtifactLibrary

_WRITE_SECONDS = 1.0
_POLL_SECONDS = 1.0
_MAX_NOTES = 5000
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_log = logging.getLogger("loraline.job")
_SEVERITIES = {"info": job_pb2.SEVERITY_INFO, "warning": job_pb2.SEVERITY_WARNING, "error": job_pb2.SEVERITY_ERROR}


class JobContext:
    """One attempt of a job. Its methods may be called from any thread of the process.

    All writes carry the attempt's epoch; once another runner has taken the job over they raise LeaseLost, and the
    handler shall let that through.
    """

    def __init__(  # noqa: PLR0913 (made in one place only, by the child process)
        self,
        *,
        job: str,
        kind: str,
        attempt: int,
        epoch: int,
        settings: CoreSettings,
        library: ArtifactLibrary,
        database: Database,
        table: JobTable,
        workdir: Path,
        telemetry: TelemetryWriter | None = None,
        stop: StopSignal | None = None,
        last_progress: job_pb2.Progress | None = None,
    ):
        self.job, self.kind, self.attempt, self.epoch = job, kind, attempt, epoch
        self.settings, self.library, self.database = settings, library, database
        self.workdir = workdir
        self._table = table
        self._telemetry = telemetry
        self._stop = stop or StopSignal()
        self._lock = threading.RLock()
        self._progress = last_progress or job_pb2.Progress()
        self._dirty = False
        self._timer: threading.Timer | None = None
        self._written_at = -math.inf
        self._pace = EventPace()
        self._begin: tuple[float, float] | None = None  # time and fraction of the attempt's first report
        self._cause = ""
        self._polled_at = -math.inf
        self._notes = 0
        self._published: set[tuple[int, str]] = set()

    # ------------------------------------------------------------------------------------------------------- progress

    def begin(self) -> None:
        """Forget what an earlier attempt measured, so that nobody takes its figures for this one's; the child calls it.

        How far the job is stays: the new attempt goes on from there.
        """
        self.check_stop()
        stale = self._progress
        if stale.metrics or stale.message or stale.HasField("eta"):
            kept = job_pb2.Progress(
                fraction=stale.fraction, step=stale.step, total_steps=stale.total_steps, unit=stale.unit
            )
            self._progress = kept
            patiently(lambda: self._table.progress(self.job, self.epoch, kept, log=False))

    @contextmanager
    def loading(self, what: str = "libraries", *, tell: bool = True) -> Iterator[None]:
        """Do something slow that saves nothing, such as an import; a wish to stop then ends the process at once."""
        if tell:
            self.check_stop()
            self.progress(message=f"loading {what}", fraction=self._progress.fraction)
        self._stop.loading.set()
        try:
            yield
        finally:
            self._stop.loading.clear()
        self.check_stop()

    def progress(
        self,
        *,
        step: int = 0,
        total_steps: int = 0,
        fraction: float | None = None,
        eta_seconds: float | None = None,
        message: str = "",
        unit: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Report how far the job is; cheap enough for every step.

        At most one report a second is written, always the newest, and the last one is never left out. `fraction`
        defaults to step / total_steps, `eta_seconds` to what the attempt's own speed promises. Metrics not named keep
        their last value.
        """
        with self._lock:
            report = job_pb2.Progress(step=step, total_steps=total_steps, message=message, unit=unit)
            report.fraction = share(step, total_steps, fraction)
            eta = self._expect(report.fraction) if eta_seconds is None else eta_seconds
            if eta is not None and math.isfinite(eta):
                report.eta.CopyFrom(Duration(seconds=max(0, round(eta))))
            report.metrics.update(self._progress.metrics)
            report.metrics.update({key: float(value) for key, value in (metrics or {}).items()})
            self._progress, self._dirty = report, True
            wait = self._written_at + _WRITE_SECONDS - time.monotonic()
            if wait <= 0:
                self._write_progress()
            elif self._timer is None:
                self._timer = threading.Timer(wait, self._late_write)
                self._timer.daemon = True
                self._timer.start()

    def _expect(self, fraction: float) -> float | None:
        now = time.monotonic()
        if self._begin is None:
            self._begin = (now, fraction)
        since, first = self._begin
        if fraction <= first or now - since < 1.0:
            return None
        return (now - since) / (fraction - first) * (1.0 - fraction)

    def _late_write(self) -> None:
        with self._lock:
            self._timer = None
            try:
                self._write_progress()
            except LeaseLost:
                self._cause = "lost"  # told to the handler by its next call

    def _write_progress(self) -> None:
        if not self._dirty:
            return
        self._written_at = time.monotonic()
        try:
            self._table.progress(self.job, self.epoch, self._progress, log=self._pace.due(self._written_at))
            self._dirty = False
        except LeaseLost:
            raise
        except LoralineError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            print(f"Progress could not be written and will be with the next: {error}", flush=True)  # to the job's log

    def last_progress(self, *, done: bool = False) -> job_pb2.Progress | None:
        """Return progress that the attempt's end shall write, or None when all is written; `done` completes it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if done and self._progress.fraction < 1.0:
                self._progress.fraction, self._dirty = 1.0, True
            if done and self._progress.HasField("eta"):
                self._progress.ClearField("eta")
                self._dirty = True
            return self._progress if self._dirty else None

    # -------------------------------------------------------------------------------------------------------- metrics

    def count(self, name: str, amount: float = 1.0, **labels: object) -> None:
        """Add to a counter of the service that runs this job; the stage has declared it (JobMetrics.accept).

        Cheap enough for every row: sums are told twice a second. Names of jobs are no labels.
        """
        if self._telemetry is not None:
            self._telemetry.count(name, amount, labels)

    def gauge(self, name: str, value: float, **labels: object) -> None:
        """Set a gauge of the service that runs this job; it goes when the job's process ends."""
        if self._telemetry is not None:
            self._telemetry.gauge(name, value, labels)

    def tell_figures(self) -> None:
        """Tell what was counted now; the child process does so at its end."""
        if self._telemetry is not None:
            self._telemetry.flush()

    # -------------------------------------------------------------------------------------------------------- remarks

    def note(self, message: str, *, severity: str = "info", reason: str = "", **fields: object) -> None:
        """Add a remark to the job's event log; severity is `info`, `warning` or `error`, reason a word in capitals."""
        if severity not in _SEVERITIES:
            raise invalid_argument("SEVERITY_UNKNOWN", f"A note's severity is one of {', '.join(_SEVERITIES)}.")
        self._notes += 1
        note = job_pb2.Note(severity=_SEVERITIES[severity], reason=reason, message=message)
        note.fields.update({key: str(value) for key, value in fields.items()})
        _log.log(_LEVELS[severity], message, extra={"reason": reason, "fields": dict(note.fields)})
        if self._notes == _MAX_NOTES:
            text = f"The job made {_MAX_NOTES} remarks; further ones are in its log file only."
            note = warning("TOO_MANY_NOTES", text, log=self.workdir / "log.txt")
        elif self._notes > _MAX_NOTES:
            print(f"{severity} {reason} {message} {fields}", flush=True)
            return
        patiently(lambda: self._table.note(self.job, self.epoch, note))

    # ------------------------------------------------------------------------------------------------------ artifacts

    def fetch(self, ref: artifact_pb2.ArtifactRef) -> Path:
        """Return a verified local folder with an artifact's files; read-only."""
        return self.library.fetch(ref)

    def publish(
        self,
        kind: int,
        name: str,
        folder: Path,
        *,
        inputs: Sequence[artifact_pb2.ArtifactRef] = (),
        settings: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        library_versions: Mapping[str, str] | None = None,
    ) -> artifact_pb2.Artifact:
        """Publish a folder as an artifact and add it to the job's outputs.

        When an earlier attempt of this job already published this kind and name, that artifact is returned and nothing
        is written, so a job that is killed late publishes once. Checkpoints are a new version each, and no output.
        """
        first_time = (kind, name) not in self._published
        artifact = None
        if self.attempt > 1 and first_time and kind != artifact_pb2.ARTIFACT_KIND_CHECKPOINT:
            artifact = published_before(self._table, self.library, self.job, kind, name)
        if artifact is None:
            artifact = self.library.publish(
                kind,
                name,
                folder,
                inputs=inputs,
                settings=settings,
                facts=facts,
                library_versions=library_versions,
                job=self.job,
                guard=lambda connection: self._table.guard(connection, self.job, self.epoch),
            )
        self._published.add((kind, name))
        ref = artifact.ref
        if kind != artifact_pb2.ARTIFACT_KIND_CHECKPOINT:
            patiently(lambda: self._table.published(self.job, self.epoch, ref))
        return artifact

    # ----------------------------------------------------------------------------------------------------------- stop

    @property
    def stop_cause(self) -> str:
        """`cancel`, `pause` or `handover` when the job shall stop, else empty; asks the database once a second."""
        now = time.monotonic()
        told = self._stop.terminated.is_set() and not self._cause
        if told or now - self._polled_at >= _POLL_SECONDS:
            self._polled_at = now
            try:
                self._cause = self._table.requested_stop(self.job, self.epoch) or self._cause
            except LeaseLost:
                raise
            except LoralineError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
            if self._stop.terminated.is_set():
                self._cause = self._cause or "handover"
        if self._cause == "lost":
            raise LeaseLost(self.job, self.epoch)
        return self._cause

    def check_stop(self) -> None:
        """Raise StopRequested when the job shall stop; call it between steps, after saving what must not be lost."""
        cause = self.stop_cause
        if cause:
            raise StopRequested(cause)
