"""Databases for the job tests: SQLite in a folder, and a real Postgres that runs for the session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.jobs.queue import JobQueue
from loraline.core.jobs.runner import JobRunner
from loraline.core.jobs.sql_table import open_table
from loraline.core.jobs.table import JobTable
from loraline.core.testing.fixtures import postgres  # noqa: F401 (a fixture)
from loraline.core.testing.jobs import HANDLERS


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[[], Database]]:
    """Opens the same migrated database again and again, as other processes would."""
    opened: list[Database] = []

    def _open() -> Database:
        opened.append(Database(database_url))
        return opened[-1]

    _open().migrate()
    yield _open
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[[], Database]) -> Database:
    return open_database()


@pytest.fixture
def table(database: Database) -> JobTable:
    return open_table(database)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> CoreSettings:
    return CoreSettings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        store_url=f"file://{tmp_path / 'store'}",
        poll_seconds=0.1,
        lease_seconds=4.0,
        stop_grace_seconds=20.0,
    )


@pytest.fixture
def queue(table: JobTable, settings: CoreSettings) -> JobQueue:
    return JobQueue(table, data_dir=settings.data_dir)


@pytest.fixture
async def start_runner(table: JobTable, settings: CoreSettings) -> AsyncIterator[Callable[..., Awaitable[JobRunner]]]:
    """Starts runners of the test kinds, with some settings changed; they are drained at the end."""
    started: list[JobRunner] = []

    async def _start(observer: Any = None, **changed: Any) -> JobRunner:
        runner = JobRunner(settings.model_copy(update=changed), table, HANDLERS, observer=observer)
        started.append(runner)
        await runner.start()
        return runner

    yield _start
    for runner in started:
        await runner.drain()
