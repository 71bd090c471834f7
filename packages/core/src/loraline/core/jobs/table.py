"""The port to the job records: what a table of jobs must be able to do, whatever keeps it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from sqlalchemy import Connection

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.jobs.model import Claim, JobEnd, NewJob, QueueState, Takeover


class JobTable(Protocol):
    """Job records with leases and event logs. Synchronous; safe to call from several threads and processes.

    Methods that take an `epoch` belong to whoever holds the lease: they raise LeaseLost and write nothing once the job
    has been claimed by another, was taken back, or is no longer RUNNING.
    """

    # ----- for callers

    def create(self, new: NewJob) -> tuple[job_pb2.Job, bool]:
        """Add a QUEUED job and return it with True; the same kind, request_id and body again: the old job and False.

        ALREADY_EXISTS when the request_id was used with another body.
        """
        ...

    def get(self, name: str) -> job_pb2.Job:
        """Return one job; NOT_FOUND."""
        ...

    def page(
        self,
        *,
        kind_prefix: str = "",
        states: Sequence[int] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 50,
        page_token: str = "",
    ) -> tuple[list[job_pb2.Job], str]:
        """Return a page of jobs, newest first, and the token of the next page (empty on the last)."""
        ...

    def request_stop(self, name: str, cause: str) -> job_pb2.Job:
        """Ask for `cancel` or `pause`: at once for a job that waits, as a wish for a RUNNING one.

        Cancelling an ended job changes nothing; pausing one is FAILED_PRECONDITION.
        """
        ...

    def resume(self, name: str) -> job_pb2.Job:
        """Queue a PAUSED, FAILED or CANCELLED job again; FAILED_PRECONDITION for others."""
        ...

    def delete(self, name: str) -> None:
        """Delete an ended job with its events; FAILED_PRECONDITION while it has not ended."""
        ...

    def events(self, name: str, after: int = 0, limit: int = 500) -> tuple[list[job_pb2.JobEvent], job_pb2.Job]:
        """Return events after a position, oldest first, and the job as it stands with the last of the log."""
        ...

    def heads(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return last sequence and state of each of these jobs that exists."""
        ...

    def queue_states(self) -> Sequence[QueueState]:
        """Return queue length and age for each kind that has jobs QUEUED or RUNNING."""
        ...

    # ----- for runners

    def on_queued(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back, from any thread, whenever a job is queued through this process; return what ends that."""
        ...

    def claim(self, kinds: Sequence[str], owner: str, lease_seconds: float) -> Claim | None:
        """Take the oldest QUEUED job of these kinds: RUNNING, epoch + 1, attempt + 1. None when none waits."""
        ...

    def reap(self, max_attempts: int, keep: Collection[str] = ()) -> Sequence[Takeover]:
        """Take RUNNING jobs whose lease has run out from their runners, except those named in `keep`.

        Each becomes QUEUED; CANCELLED or PAUSED when that was asked for; FAILED (WORKER_LOST) when its process was
        lost for the max_attempts-th time.
        """
        ...

    def heartbeat(self, name: str, epoch: int, lease_seconds: float) -> str:
        """Extend the lease from now on and return the requested stop."""
        ...

    def release(self, name: str, epoch: int) -> int:
        """Hand the lease back without counting the attempt as lost and return the new state.

        That is QUEUED, or PAUSED or CANCELLED when that was asked for.
        """
        ...

    def lost(self, name: str, epoch: int, note: job_pb2.Note, max_attempts: int) -> int:
        """Record that the attempt's process died without a word (`note` says how) and return the state it led to."""
        ...

    # ----- for the job's own process

    def requested_stop(self, name: str, epoch: int) -> str:
        """Return `cancel`, `pause` or nothing."""
        ...

    def progress(self, name: str, epoch: int, progress: job_pb2.Progress, *, log: bool = True) -> None:
        """Keep the progress in the record, and in the event log too when `log`."""
        ...

    def note(self, name: str, epoch: int, note: job_pb2.Note) -> None:
        """Add a remark to the log."""
        ...

    def published(self, name: str, epoch: int, ref: artifact_pb2.ArtifactRef) -> None:
        """Add an output to the record and the log; one that is there already changes nothing."""
        ...

    def finish(self, name: str, epoch: int, end: JobEnd, progress: job_pb2.Progress | None = None) -> None:
        """End the attempt: new state, result or error, last progress, and no lease any more, in one transaction.

        A wish to cancel that came in meanwhile turns PAUSED and FAILED into CANCELLED; SUCCEEDED stays.
        """
        ...

    def guard(self, connection: Connection, name: str, epoch: int) -> None:
        """Raise LeaseLost unless the job is held under this epoch until the connection's transaction ends."""
        ...
