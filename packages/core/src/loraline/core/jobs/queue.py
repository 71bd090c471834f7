"""Jobs as servicers see them: the table's methods without blocking the event loop."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import structlog
from google.protobuf.message import Message

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.job.v1.job_pb2 import Job, JobEvent
from loraline.core import tracing
from loraline.core.errors import invalid_argument
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.model import NewJob
from loraline.core.jobs.observer import JobObserver, NoObserver
from loraline.core.jobs.table import JobTable
from loraline.core.jobs.watch import WatchHub
from loraline.core.jobs.workdir import remove_job_folder

_MAX_LABELS = 64
log = structlog.get_logger("loraline.jobs")


class JobQueue:
    """Submits, reads and steers jobs; one per process, used from its event loop."""

    def __init__(self, table: JobTable, *, data_dir: Path | None = None, observer: JobObserver | None = None):
        self.table = table
        self._data_dir = data_dir
        self._observer = observer or NoObserver()
        self._hub = WatchHub(table)

    async def submit(
        self,
        handler: JobHandler,
        request: Message,
        *,
        inputs: Sequence[ArtifactRef] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Job:
        """Queue a job for a request whose defaults are filled in and whose `inputs` are exact, and return it.

        When the request has a `request_id` that was used for this kind before, the job of then is returned if the rest
        is equal too, else ALREADY_EXISTS is raised.
        """
        if not isinstance(request, handler.request_type):
            raise TypeError(f"{handler.kind} takes {handler.request_type.__name__}, not {type(request).__name__}")
        request_id = str(getattr(request, "request_id", ""))
        if len(request_id) > 128:
            raise invalid_argument("REQUEST_ID_TOO_LONG", "A request_id has at most 128 characters.", request_id="long")
        _check_labels(labels or {})
        trace = tracing.to_text(tracing.carrier())
        new = NewJob(handler.kind, request, request_id, tuple(inputs), dict(labels or {}), trace)
        job, created = await asyncio.to_thread(self.table.create, new)
        if created:
            self._observer.job_submitted(handler.kind)
            whose = {"labels": new.labels} if new.labels else {}
            log.info("job_submitted", job=job.name, kind=handler.kind, job_request_id=request_id, **whose)
        return job

    async def get(self, name: str) -> Job:
        """Return one job; NOT_FOUND."""
        return await asyncio.to_thread(self.table.get, name)

    async def list(
        self,
        *,
        kind_prefix: str = "",
        states: Sequence[int] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 50,
        page_token: str = "",
    ) -> tuple[builtins.list[Job], str]:
        """Return a page of jobs, newest first, and the token of the next page (empty on the last)."""
        return await asyncio.to_thread(
            self.table.page,
            kind_prefix=kind_prefix,
            states=states,
            labels=labels,
            page_size=page_size,
            page_token=page_token,
        )

    async def cancel(self, name: str) -> Job:
        """Cancel a job: at once when it waits or is PAUSED, as a wish when it runs; an ended job stays as it is."""
        return await asyncio.to_thread(self.table.request_stop, name, "cancel")

    async def pause(self, name: str) -> Job:
        """Pause a job: at once when it waits, as a wish when it runs. FAILED_PRECONDITION when it has ended."""
        return await asyncio.to_thread(self.table.request_stop, name, "pause")

    async def resume(self, name: str) -> Job:
        """Queue a PAUSED, FAILED or CANCELLED job again; FAILED_PRECONDITION for others."""
        return await asyncio.to_thread(self.table.resume, name)

    async def delete(self, name: str) -> None:
        """Delete an ended job's record, events and work folder on this machine; its artifacts stay."""
        await asyncio.to_thread(self.table.delete, name)
        if self._data_dir is not None:
            await asyncio.to_thread(remove_job_folder, self._data_dir, name)

    async def events(self, name: str, after: int = 0, limit: int = 500) -> builtins.list[JobEvent]:
        """Return events after a position, oldest first."""
        found, _ = await asyncio.to_thread(self.table.events, name, after, limit)
        return found

    def watch(self, name: str, after: int = 0) -> AsyncIterator[tuple[JobEvent, Job]]:
        """Yield each event after a position with the job as it stands, until the job has ended; NOT_FOUND."""
        return self._hub.follow(name, after)


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > _MAX_LABELS:
        raise invalid_argument("LABELS_TOO_MANY", f"A job has at most {_MAX_LABELS} labels.", labels=str(len(labels)))
    for key, value in labels.items():
        if not 1 <= len(key) <= 128 or len(value) > 256:
            problem = f"{key[:40]!r}: keys have 1 to 128 characters, values at most 256"
            raise invalid_argument("LABEL_TOO_LONG", f"A label is too long or empty: {problem}.", labels=problem)
