"""The half of the SQL job table that callers use: create, read, steer, delete."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from google.protobuf import any_pb2
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from loraline.api.job.v1 import job_pb2
from loraline.core.db.schema import job_events, job_labels, jobs
from loraline.core.errors import already_exists, invalid_argument
from loraline.core.jobs.endings import user_pause
from loraline.core.jobs.model import (
    CANCELLED,
    ENDED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    NewJob,
    QueueState,
    event_from_row,
    fingerprint,
    job_from_row,
    new_name,
    no_such_job,
    refs_to_json,
    state_change,
    wrong_state,
)
from loraline.core.jobs.sql_rows import SqlRows


class SqlRecords(SqlRows):
    """Job records for callers; see JobTable for what each method promises."""

    def create(self, new: NewJob) -> tuple[job_pb2.Job, bool]:
        """Add a QUEUED job, or return the one that the same request made before."""
        name, mark = new_name(new.kind), fingerprint(new.spec)
        spec = any_pb2.Any()
        spec.Pack(new.spec, deterministic=True)
        with self.database.begin() as connection:
            values = {
                "name": name,
                "kind": new.kind,
                "state": QUEUED,
                "spec": spec.SerializeToString(),
                "request_id": new.request_id or None,
                "fingerprint": mark,
                "inputs": refs_to_json(new.inputs),
                "labels": json.dumps(dict(new.labels)),
                "trace": new.trace,
                "last_sequence": 1,
                "create_time": self._now(),
                "queue_time": self._now(),
                "update_time": self._now(),
            }
            dialect = postgresql if self._is_postgres else sqlite
            statement = dialect.insert(jobs).values(**values)
            statement = statement.on_conflict_do_nothing(index_elements=["kind", "request_id"]).returning(jobs)
            row = connection.execute(statement).one_or_none()
            if row is None:
                return self._same_request(connection, new, mark), False
            self._append(connection, name, 1, 0, [state_change(job_pb2.JOB_STATE_UNSPECIFIED, QUEUED)])
            for key, value in new.labels.items():
                connection.execute(job_labels.insert().values(job=name, key=key, value=value))
        self._wake()
        return job_from_row(row), True

    def _same_request(self, connection: Connection, new: NewJob, mark: str) -> job_pb2.Job:
        where = (jobs.c.kind == new.kind, jobs.c.request_id == new.request_id)
        row = connection.execute(sa.select(jobs).where(*where)).one()
        if row.fingerprint != mark:
            raise already_exists(
                "REQUEST_ID_REUSED",
                f"The request_id {new.request_id!r} already made job {row.name} from another request. "
                "Send the same request to get that job, or use a new request_id.",
                job=row.name,
                request_id=new.request_id,
            )
        return job_from_row(row)

    def get(self, name: str) -> job_pb2.Job:
        """Return one job."""
        with self.database.read() as connection:
            return self._get(connection, name)

    def _get(self, connection: Connection, name: str) -> job_pb2.Job:
        row = connection.execute(sa.select(jobs).where(jobs.c.name == name)).one_or_none()
        if row is None:
            raise no_such_job(name)
        return job_from_row(row)

    def page(
        self,
        *,
        kind_prefix: str = "",
        states: Sequence[int] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 50,
        page_token: str = "",
    ) -> tuple[list[job_pb2.Job], str]:
        """Return a page of jobs, newest first."""
        size = min(page_size or 50, 500)
        filters = hashlib.sha256(repr((kind_prefix, sorted(states), sorted((labels or {}).items()))).encode())
        mark = filters.hexdigest()[:8]
        query = sa.select(jobs).order_by(jobs.c.seq.desc()).limit(size + 1)
        if page_token:
            query = query.where(jobs.c.seq < _read_token(page_token, mark))
        if kind_prefix:
            query = query.where(jobs.c.kind.startswith(kind_prefix, autoescape=True))
        if states:
            query = query.where(jobs.c.state.in_(list(states)))
        for key, value in (labels or {}).items():
            same = (job_labels.c.job == jobs.c.name, job_labels.c.key == key, job_labels.c.value == value)
            query = query.where(sa.exists().where(*same))
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        token = _write_token(rows[size - 1].seq, mark) if len(rows) > size else ""
        return [job_from_row(row) for row in rows[:size]], token

    def request_stop(self, name: str, cause: str) -> job_pb2.Job:
        """Cancel or pause: at once for a job that waits, as a wish for a RUNNING one."""
        with self.database.begin() as connection:
            row = self._locked(connection, name)
            if row.state == RUNNING:
                # A wish to cancel is final; a later wish to pause does not weaken it.
                if row.requested_stop != "cancel":
                    wish = {"requested_stop": cause, "update_time": self._now()}
                    connection.execute(jobs.update().where(jobs.c.name == name).values(**wish))
            elif cause == "cancel" and row.state not in ENDED:
                self._change(connection, row, CANCELLED, {})
            elif cause == "pause" and row.state == QUEUED:
                self._change(connection, row, PAUSED, {"pause": user_pause(name).SerializeToString()})
            elif cause == "pause" and row.state in ENDED:
                raise wrong_state(name, row.state, "can't be paused any more")
            return self._get(connection, name)

    def resume(self, name: str) -> job_pb2.Job:
        """Queue a PAUSED, FAILED or CANCELLED job again."""
        with self.database.begin() as connection:
            row = self._locked(connection, name)
            if row.state not in {PAUSED, FAILED, CANCELLED}:
                raise wrong_state(name, row.state, "can't be resumed; only PAUSED, FAILED and CANCELLED jobs can")
            self._change(connection, row, QUEUED, {"lost_attempts": 0})
            job = self._get(connection, name)
        self._wake()
        return job

    def delete(self, name: str) -> None:
        """Delete an ended job with its events and labels."""
        with self.database.begin() as connection:
            row = self._locked(connection, name)
            if row.state not in ENDED:
                raise wrong_state(name, row.state, "can't be deleted before it has ended; cancel it first")
            connection.execute(jobs.delete().where(jobs.c.name == name))

    def events(self, name: str, after: int = 0, limit: int = 500) -> tuple[list[job_pb2.JobEvent], job_pb2.Job]:
        """Return events after a position and the job, both as of one moment."""
        where = (job_events.c.job == name, job_events.c.sequence > after)
        query = sa.select(job_events).where(*where).order_by(job_events.c.sequence).limit(limit)
        with self.database.read() as connection:
            # The job first: on Postgres each statement sees its own moment, and events may only be newer than the job.
            job = self._get(connection, name)
            rows = connection.execute(query.where(job_events.c.sequence <= job.last_sequence)).all()
        return [event_from_row(row) for row in rows], job

    def heads(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return last sequence and state by name."""
        query = sa.select(jobs.c.name, jobs.c.last_sequence, jobs.c.state)
        found: dict[str, tuple[int, int]] = {}
        with self.database.read() as connection:
            for start in range(0, len(names), 500):
                rows = connection.execute(query.where(jobs.c.name.in_(list(names[start : start + 500]))))
                found.update({row.name: (row.last_sequence, row.state) for row in rows})
        return found

    def queue_states(self) -> list[QueueState]:
        """Return queue length and age by kind."""
        waits = sa.func.sum(sa.case((jobs.c.state == QUEUED, 1), else_=0))
        runs = sa.func.sum(sa.case((jobs.c.state == RUNNING, 1), else_=0))
        oldest = sa.func.min(sa.case((jobs.c.state == QUEUED, jobs.c.queue_time)))
        columns: list[Any] = [jobs.c.kind, waits.label("queued"), runs.label("running")]
        columns.append(sa.func.coalesce(self._now() - oldest, 0.0).label("age"))
        query = sa.select(*columns).where(jobs.c.state.in_([QUEUED, RUNNING])).group_by(jobs.c.kind)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        return [QueueState(row.kind, int(row.queued), int(row.running), max(0.0, float(row.age))) for row in rows]


def _write_token(seq: int, mark: str) -> str:
    return base64.urlsafe_b64encode(f"{mark}:{seq}".encode()).decode()


def _read_token(token: str, mark: str) -> int:
    try:
        found, _, seq = base64.urlsafe_b64decode(token.encode()).decode().partition(":")
        position = int(seq)
    except ValueError:
        found, position = "", 0
    if found != mark:
        raise invalid_argument(
            "PAGE_TOKEN_INVALID",
            "The page_token does not belong to this list. Use the next_page_token of a call with the same filters.",
            **{"page_token": "not a token of this list"},
        )
    return position
