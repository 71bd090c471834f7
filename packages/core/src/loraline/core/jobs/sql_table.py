"""The job table on SQLite and Postgres."""

from __future__ import annotations

from loraline.core.db.database import Database
from loraline.core.jobs.sql_leases import SqlLeases
from loraline.core.jobs.sql_records import SqlRecords
from loraline.core.jobs.table import JobTable


class SqlJobTable(SqlRecords, SqlLeases):
    """Job records in the platform's database: `FOR UPDATE SKIP LOCKED` on Postgres, one writer at a time on SQLite."""


def open_table(database: Database) -> JobTable:
    """Return the job table of a migrated database."""
    return SqlJobTable(database)
