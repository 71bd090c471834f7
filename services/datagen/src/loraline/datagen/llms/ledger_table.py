"""The ledger as a table of the platform's database: for replicas on several machines, which share no disk.

Whichever machine takes a job over reads what the others recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from loraline.core.db.database import Database
from loraline.core.db.schema import llm_calls
from loraline.core.jobs.model import no_such_job
from loraline.core.jobs.patience import patiently
from loraline.datagen.llms.ledger import CallRecord, Ledger, Line, record_of

PAGE = 500
COLUMNS = llm_calls.c


class TableLedger(Ledger):
    """Rows of `llm_calls`; they go with their job.

    A worker that was presumed dead may still write what it paid for: rows have numbers of the database, so two writers
    never collide, and the next attempt reads both.
    """

    def __init__(self, database: Database, job: str, source: int, since: float = 0.0):
        super().__init__()
        self._database, self._job, self._source, self._since = database, job, source, since

    def _recorded(self) -> Iterator[CallRecord]:
        mine = sa.and_(COLUMNS.job == self._job, COLUMNS.source == self._source)
        after = 0
        while True:
            page = self._page(
                sa.select(COLUMNS.id, COLUMNS.record).where(mine, COLUMNS.id > after).order_by(COLUMNS.id)
            )  # fmt: skip
            for number, line in page:
                after = number
                yield record_of(line, f"llm_calls:{number}")
            if len(page) < PAGE:
                return

    def known(self, plans: Sequence[str], first_call: int) -> Iterator[CallRecord]:
        """Yield what other jobs recorded, whichever machine ran them."""
        others = sa.and_(
            COLUMNS.plan.in_(plans), COLUMNS.outcome == "answered", COLUMNS.answer_time >= self._since,
            COLUMNS.job != self._job,
        )  # fmt: skip
        place = sa.tuple_(COLUMNS.call, COLUMNS.id)
        after = (first_call, 0)
        while True:
            page = self._page(
                sa.select(COLUMNS.id, COLUMNS.record, COLUMNS.call, COLUMNS.job)
                .where(others, place > after)
                .order_by(COLUMNS.call, COLUMNS.id)
            )
            for number, line, call, job in page:
                after = (call, number)
                record = record_of(line, f"llm_calls:{number}")
                if not record.paid_by:
                    yield dataclasses.replace(record, paid_by=job)
            if len(page) < PAGE:
                return

    def _page(self, query: sa.Select[*tuple[Any, ...]]) -> Sequence[Any]:
        def read() -> Sequence[Any]:
            with self._database.read() as connection:
                return connection.execute(query.limit(PAGE)).all()

        return patiently(read)

    def _write(self, lines: Sequence[Line]) -> None:
        rows = [
            {"job": self._job, "source": self._source, "plan": record.plan, "call": record.call,
             "outcome": record.outcome, "answer_time": record.answered_at, "record": line}
            for record, line in lines
        ]  # fmt: skip

        def write() -> None:
            with self._database.begin() as connection:
                connection.execute(llm_calls.insert(), rows)

        try:
            patiently(write)
        except IntegrityError as error:
            raise no_such_job(self._job) from error  # It was deleted while it ran; its answers go with it.
