"""The migrations make the tables that the schema describes, whoever comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from loraline.core.db.database import Database
from loraline.core.db.schema import metadata

_MIGRATE = "import sys; from loraline.core.db.database import Database; Database(sys.argv[1]).migrate()"


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_several_processes_migrate_at_once(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db" if kind == "sqlite" else request.getfixturevalue("postgres").new_database()
    running = [subprocess.Popen([sys.executable, "-c", _MIGRATE, url]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    database = Database(url)
    database.migrate()
    with database.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        versions: Any = connection.execute(sa.text("SELECT count(*) FROM alembic_version"))
        assert versions.scalar() == 1
        if kind == "sqlite":
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    database.close()
