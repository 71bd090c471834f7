"""The half of the SQL job table that runners and job processes use; every write here is fenced by the epoch."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.db.schema import jobs
from loraline.core.jobs.endings import expired_note, user_pause
from loraline.core.jobs.model import (
    CANCELLED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    Claim,
    JobEnd,
    LeaseLost,
    Takeover,
    check_transition,
    refs_from_json,
    refs_to_json,
    state_change,
    warning,
)
from loraline.core.jobs.sql_rows import SqlRows

_REAP_BATCH = 50


class SqlLeases(SqlRows):
    """Leases and the writes of those who hold one; see JobTable for what each method promises."""

    def claim(self, kinds: Sequence[str], owner: str, lease_seconds: float) -> Claim | None:
        """Take the oldest QUEUED job of these kinds."""
        waiting = sa.select(jobs.c.seq).where(jobs.c.state == QUEUED, jobs.c.kind.in_(list(kinds)))
        waiting = waiting.order_by(jobs.c.seq).limit(1)
        if not self._is_postgres:  # idle runners shall not take SQLite's only write lock
            with self.database.read() as connection:
                if connection.execute(waiting).first() is None:
                    return None
        with self.database.begin() as connection:
            now = self._now()
            statement = (
                jobs.update()
                .where(jobs.c.seq == waiting.with_for_update(skip_locked=True).scalar_subquery())
                .where(jobs.c.state == QUEUED)
                .values(
                    state=RUNNING,
                    epoch=jobs.c.epoch + 1,
                    attempt=jobs.c.attempt + 1,
                    lease_owner=owner,
                    lease_expires=now + lease_seconds,
                    requested_stop="",
                    start_time=sa.func.coalesce(jobs.c.start_time, now),
                    update_time=now,
                    last_sequence=jobs.c.last_sequence + 1,
                )
                .returning(
                    jobs.c.name,
                    jobs.c.kind,
                    jobs.c.epoch,
                    jobs.c.attempt,
                    jobs.c.last_sequence,
                    jobs.c.trace,
                    jobs.c.labels,
                    (now - jobs.c.queue_time).label("waited"),
                )
            )
            row = connection.execute(statement).one_or_none()
            if row is None:
                return None
            self._append(connection, row.name, row.last_sequence, row.attempt, [state_change(QUEUED, RUNNING)])
            waited, labels = max(0.0, float(row.waited)), json.loads(row.labels)
            return Claim(row.name, row.kind, row.epoch, row.attempt, waited, row.trace, labels)

    def reap(self, max_attempts: int, keep: Collection[str] = ()) -> list[Takeover]:
        """Take RUNNING jobs whose lease has run out from their runners."""
        silent = (jobs.c.state == RUNNING, jobs.c.lease_expires < self._now(), jobs.c.name.not_in(list(keep)))
        expired = sa.select(jobs).where(*silent).limit(_REAP_BATCH)
        with self.database.read() as connection:
            if connection.execute(expired.with_only_columns(jobs.c.seq)).first() is None:
                return []
        taken: list[Takeover] = []
        with self.database.begin() as connection:
            for row in connection.execute(expired.with_for_update(skip_locked=True)).all():
                state = self._lose(connection, row, expired_note(row.lease_owner), max_attempts)
                taken.append(Takeover(row.name, row.kind, state))
        return taken

    def heartbeat(self, name: str, epoch: int, lease_seconds: float) -> str:
        """Extend the lease and return the requested stop."""
        statement = (
            jobs.update()
            .where(jobs.c.name == name, jobs.c.epoch == epoch, jobs.c.state == RUNNING)
            .values(lease_expires=self._now() + lease_seconds)
            .returning(jobs.c.requested_stop)
        )
        with self.database.begin() as connection:
            row = connection.execute(statement).one_or_none()
        if row is None:
            raise LeaseLost(name, epoch)
        return row.requested_stop

    def release(self, name: str, epoch: int) -> int:
        """Hand the lease back."""
        with self.database.begin() as connection:
            row = self._held(connection, name, epoch)
            end = _as_wished(row.name, JobEnd(QUEUED), row.requested_stop)
            self._change(connection, row, end.state, _contents(end))
            return end.state

    def lost(self, name: str, epoch: int, note: job_pb2.Note, max_attempts: int) -> int:
        """Record that the attempt's process died without a word."""
        with self.database.begin() as connection:
            return self._lose(connection, self._held(connection, name, epoch), note, max_attempts)

    def requested_stop(self, name: str, epoch: int) -> str:
        """Return the wish to stop."""
        where = (jobs.c.name == name, jobs.c.epoch == epoch, jobs.c.state == RUNNING)
        with self.database.read() as connection:
            row = connection.execute(sa.select(jobs.c.requested_stop).where(*where)).one_or_none()
        if row is None:
            raise LeaseLost(name, epoch)
        return row.requested_stop

    def progress(self, name: str, epoch: int, progress: job_pb2.Progress, *, log: bool = True) -> None:
        """Keep the progress."""
        events = [job_pb2.JobEvent(progress=progress)] if log else []
        with self.database.begin() as connection:
            self._held_update(connection, name, epoch, {"progress": progress.SerializeToString()}, events)

    def note(self, name: str, epoch: int, note: job_pb2.Note) -> None:
        """Add a remark to the log."""
        with self.database.begin() as connection:
            self._held_update(connection, name, epoch, {}, [job_pb2.JobEvent(note=note)])

    def published(self, name: str, epoch: int, ref: artifact_pb2.ArtifactRef) -> None:
        """Add an output."""
        with self.database.begin() as connection:
            outputs = refs_from_json(self._held(connection, name, epoch).outputs)
            if ref not in outputs:
                values = {"outputs": refs_to_json([*outputs, ref])}
                self._held_update(connection, name, epoch, values, [job_pb2.JobEvent(published=ref)])

    def finish(self, name: str, epoch: int, end: JobEnd, progress: job_pb2.Progress | None = None) -> None:
        """End the attempt."""
        check_transition(name, RUNNING, end.state)
        with self.database.begin() as connection:
            end = _as_wished(name, end, self._held(connection, name, epoch).requested_stop)
            values: dict[str, Any] = {"state": end.state, **self._times(end.state), **_contents(end)}
            values |= {"lease_owner": "", "lease_expires": 0.0, "requested_stop": ""}
            events: list[job_pb2.JobEvent] = []
            if progress is not None:
                values["progress"] = progress.SerializeToString()
                events.append(job_pb2.JobEvent(progress=progress))
            if end.note is not None:
                events.append(job_pb2.JobEvent(note=end.note))
            events.append(state_change(RUNNING, end.state))
            self._held_update(connection, name, epoch, values, events)

    def guard(self, connection: Connection, name: str, epoch: int) -> None:
        """Raise LeaseLost unless the job is held under this epoch until the transaction ends."""
        query = sa.select(jobs.c.seq).where(jobs.c.name == name, jobs.c.epoch == epoch, jobs.c.state == RUNNING)
        # Shared, so that publishing does not wait for the job's own progress writes longer than needed.
        if connection.execute(query.with_for_update(read=True)).one_or_none() is None:
            raise LeaseLost(name, epoch)

    def _held(self, connection: Connection, name: str, epoch: int) -> Any:
        """Return the locked row of a job that is held under this epoch."""
        query = sa.select(jobs).where(jobs.c.name == name).with_for_update()
        row = connection.execute(query).one_or_none()
        if row is None or row.epoch != epoch or row.state != RUNNING:
            raise LeaseLost(name, epoch)
        return row


def _as_wished(name: str, end: JobEnd, wish: str) -> JobEnd:
    """Return the end that a wish to stop turns another one into: whoever asked last must not be forgotten."""
    if wish == "cancel" and end.state in {QUEUED, PAUSED, FAILED}:
        note = end.note
        if end.error is not None:
            note = warning("FAILED_WHILE_STOPPING", f"While it was being cancelled the job failed: {end.error.message}")
        return JobEnd(CANCELLED, note=note)
    if wish == "pause" and end.state == QUEUED:
        return JobEnd(PAUSED, pause=user_pause(name), note=end.note)
    return end


def _contents(end: JobEnd) -> dict[str, bytes]:
    parts = {"result": end.result, "error": end.error, "pause": end.pause}
    return {key: part.SerializeToString(deterministic=True) for key, part in parts.items() if part is not None}
