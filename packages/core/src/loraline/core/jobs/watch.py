"""Follows event logs for many watchers with one query an interval."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from loraline.api.job.v1 import job_pb2
from loraline.core.jobs.model import ENDED
from loraline.core.jobs.table import JobTable

_INTERVAL_SECONDS = 0.25
_BATCH = 200


class WatchHub:
    """Tells watchers when a job's log has grown; asks the table only while somebody watches."""

    def __init__(self, table: JobTable):
        self._table = table
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._heads: dict[str, tuple[int, int] | None] = {}
        self._task: asyncio.Task[None] | None = None

    async def follow(self, name: str, after: int = 0) -> AsyncIterator[tuple[job_pb2.JobEvent, job_pb2.Job]]:
        """Yield events after a position with the job as it stands, until it has ended and all were yielded.

        NOT_FOUND when there is no such job, or when it is deleted meanwhile.
        """
        changed = asyncio.Event()
        self._watchers.setdefault(name, set()).add(changed)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll(), name="job-watch")
        try:
            while True:
                changed.clear()  # before the read: what is written after it sets the event again
                events, job = await asyncio.to_thread(self._table.events, name, after, _BATCH)
                for event in events:
                    yield event, job
                    after = event.sequence
                if len(events) == _BATCH or after < job.last_sequence:
                    continue
                if job.state in ENDED:
                    return
                await changed.wait()
        finally:
            self._leave(name, changed)

    def _leave(self, name: str, changed: asyncio.Event) -> None:
        watchers = self._watchers.get(name, set())
        watchers.discard(changed)
        if not watchers:
            self._watchers.pop(name, None)
            self._heads.pop(name, None)

    async def _poll(self) -> None:
        while self._watchers:
            await asyncio.sleep(_INTERVAL_SECONDS)
            names = list(self._watchers)
            try:
                heads = await asyncio.to_thread(self._table.heads, names)
            except Exception:  # each watcher shall ask for itself and get the error
                for watchers in self._watchers.values():
                    for changed in watchers:
                        changed.set()
                continue
            for name in names:
                head = heads.get(name)
                if name in self._watchers and (name not in self._heads or self._heads[name] != head):
                    self._heads[name] = head
                    for changed in self._watchers[name]:
                        changed.set()
