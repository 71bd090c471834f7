"""What every statement on the job tables shares: the clock, locked rows, and events in sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from loraline.api.job.v1 import job_pb2
from loraline.core.db.database import Database
from loraline.core.db.schema import job_events, jobs
from loraline.core.jobs.endings import user_pause, worker_lost
from loraline.core.jobs.model import (
    CANCELLED,
    ENDED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    LeaseLost,
    check_transition,
    no_such_job,
    state_change,
)

# Tables on the same database object share their listeners, so a queue and a runner need not know each other.
_LISTENERS: WeakKeyDictionary[Database, set[Callable[[], None]]] = WeakKeyDictionary()


class SqlRows:
    """Base of the SQL job table."""

    def __init__(self, database: Database):
        self.database = database
        self._is_postgres = database.engine.dialect.name == "postgresql"
        self._listeners = _LISTENERS.setdefault(database, set())

    def on_queued(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back whenever a job becomes QUEUED through this process; return what ends that."""
        self._listeners.add(callback)
        return lambda: self._listeners.discard(callback)

    def _wake(self) -> None:
        for callback in tuple(self._listeners):
            callback()

    def _now(self) -> Any:
        """Return the time now, in seconds since the epoch, as a value for a statement.

        Replicas on several machines share the clock of Postgres; SQLite has only the one machine's.
        """
        if self._is_postgres:
            return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)
        return sa.literal(time.time(), sa.Double)

    def _locked(self, connection: Connection, name: str) -> Row[Any]:
        """Return a job's row and keep others from changing it until the transaction ends; NOT_FOUND."""
        # SQLite leaves FOR UPDATE out of the statement; its transaction already is the only writer.
        row = connection.execute(sa.select(jobs).where(jobs.c.name == name).with_for_update()).one_or_none()
        if row is None:
            raise no_such_job(name)
        return row

    def _append(self, connection: Connection, name: str, last: int, attempt: int, events: Sequence[Any]) -> None:
        """Insert events, the newest of which has the sequence number `last`."""
        first = last - len(events) + 1
        for offset, event in enumerate(events):
            payload = event.SerializeToString()
            values = {"job": name, "sequence": first + offset, "attempt": attempt, "payload": payload}
            connection.execute(job_events.insert().values(time=self._now(), **values))

    def _change(
        self, connection: Connection, row: Row[Any], state: int, values: Mapping[str, Any], notes: Sequence[Any] = ()
    ) -> None:
        """Move a locked row to another state, with its events; FAILED_PRECONDITION when that is not legal."""
        check_transition(row.name, row.state, state)
        events = [*(job_pb2.JobEvent(note=note) for note in notes), state_change(row.state, state)]
        changed: dict[str, Any] = {
            "state": state,
            "last_sequence": row.last_sequence + len(events),
            "update_time": self._now(),
            **self._times(state),
            **values,
        }
        if state != RUNNING:
            changed |= {"lease_owner": "", "lease_expires": 0.0, "requested_stop": ""}
        connection.execute(jobs.update().where(jobs.c.name == row.name).values(**changed))
        self._append(connection, row.name, changed["last_sequence"], row.attempt, events)

    def _times(self, state: int) -> dict[str, Any]:
        if state == QUEUED:
            return {"queue_time": self._now(), "end_time": None, "pause": None, "error": None}
        if state in ENDED:
            return {"end_time": self._now(), "pause": None}
        return {}

    def _held_update(
        self, connection: Connection, name: str, epoch: int, values: Mapping[str, Any], events: Sequence[Any]
    ) -> None:
        """Change a held job's row and log its events, or raise LeaseLost: one statement decides."""
        statement = (
            jobs.update()
            .where(jobs.c.name == name, jobs.c.epoch == epoch, jobs.c.state == RUNNING)
            .values(last_sequence=jobs.c.last_sequence + len(events), update_time=self._now(), **values)
            .returning(jobs.c.last_sequence, jobs.c.attempt)
        )
        row = connection.execute(statement).one_or_none()
        if row is None:
            raise LeaseLost(name, epoch)
        self._append(connection, name, row.last_sequence, row.attempt, events)

    def _lose(self, connection: Connection, row: Row[Any], note: job_pb2.Note, max_attempts: int) -> int:
        """Take a locked RUNNING row from a runner whose process is gone; return its new state."""
        losses = row.lost_attempts + 1
        values: dict[str, Any] = {"lost_attempts": losses}
        if row.requested_stop == "cancel":
            state = CANCELLED
        elif row.requested_stop == "pause":
            state = PAUSED
            values["pause"] = user_pause(row.name).SerializeToString()
        elif losses >= max_attempts:
            state = FAILED
            values["error"] = worker_lost(note, losses).to_status().SerializeToString()
        else:
            state = QUEUED
        self._change(connection, row, state, values, [note])
        return state
