"""Connections and transactions, the same on SQLite and Postgres."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from loraline.core.errors import LoralineError, invalid_argument, resource_exhausted, unavailable

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x10_4A_11_4E  # any number that nobody else on the same Postgres database uses
_BUSY_SECONDS = 60.0
# Alembic keeps the running context in module globals, so two migrations in one process take turns.
_migrating = threading.Lock()


def parse_url(text: str) -> URL:
    """Return the SQLAlchemy URL for a database address; INVALID_ARGUMENT for anything but SQLite files and Postgres."""
    remedy = "Set LORALINE_DATABASE_URL to sqlite:////absolute/file.db or postgresql://user:password@host/database."
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise invalid_argument("DATABASE_URL_INVALID", f"The database address can't be read. {remedy}") from error
    backend = url.get_backend_name()
    if backend in {"postgres", "postgresql"}:
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise invalid_argument("DATABASE_URL_INVALID", f"Databases of the kind {backend!r} are not served. {remedy}")
    if url.database in {None, "", ":memory:"}:
        raise invalid_argument(
            "DATABASE_URL_INVALID", f"SQLite needs a file: job processes can't see another's memory. {remedy}"
        )
    return url.set(drivername="sqlite+pysqlite")


class Database:
    """One database, with a pool of connections; make one per process and close it at the end.

    Nothing is opened before the first use, so an unreachable server shows itself there, as UNAVAILABLE.
    """

    engine: Engine

    def __init__(self, url: str):
        self._url = parse_url(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        # SQLite's own waiting is polling with growing sleeps; threads of one process queue up here instead.
        self._writing = threading.Lock() if self.is_sqlite else None
        self.engine = self._sqlite_engine() if self.is_sqlite else self._postgres_engine()

    def _sqlite_engine(self) -> Engine:
        Path(self._url.database or "").absolute().parent.mkdir(parents=True, exist_ok=True)
        # Enough connections for every thread of a server: each holds one for milliseconds only.
        engine = sa.create_engine(
            self._url, connect_args={"timeout": _BUSY_SECONDS}, pool_size=8, max_overflow=32, pool_timeout=_BUSY_SECONDS
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # the driver shall not begin transactions of its own
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # A transaction that reads first and writes later would fail at once when another wrote in between;
            # IMMEDIATE waits for its turn instead.
            reading = connection.get_execution_options().get("loraline_read", False)
            connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

        return engine

    def _postgres_engine(self) -> Engine:
        try:
            return sa.create_engine(
                self._url,
                pool_size=8,
                max_overflow=32,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 10, "application_name": "loraline"},
            )
        except ModuleNotFoundError as error:
            raise invalid_argument(
                "DATABASE_DRIVER_MISSING", "Postgres needs its driver: install loraline-core[postgres]."
            ) from error

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction that may write; it is committed at the end of the block, or undone when it raises.

        On SQLite writers take turns, and waiting for longer than a minute is UNAVAILABLE.
        """
        with self._my_turn(), self._typed_errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if self._writing is None:
            yield
            return
        if not self._writing.acquire(timeout=_BUSY_SECONDS):
            raise self._busy()
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads; on SQLite it waits for no writer."""
        with self._typed_errors(), self.engine.connect() as opened:
            connection = opened.execution_options(loraline_read=True)
            with connection.begin():
                yield connection

    def migrate(self) -> None:
        """Bring the tables to the newest revision; processes that call it at the same time take turns."""
        # Imported here, because a job's process never migrates and need not wait for it.
        from alembic import command
        from alembic.config import Config

        config = Config()
        # ConfigParser would read a percent sign in the path as an interpolation.
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with _migrating, self.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, PoolTimeout) as error:
            raise self._typed(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise self._typed(error) from error
            raise

    def _typed(self, error: Exception) -> LoralineError:
        where = self._url.render_as_string(hide_password=True)
        # Drivers put the password into no message, but a long traceback text helps nobody either.
        cause = str(getattr(error, "orig", error)).strip().splitlines()
        text = cause[0] if cause else type(error).__name__
        if "disk is full" in text or "No space left" in text:
            return resource_exhausted("DISK_FULL", f"The database {where} has no room left: {text}. Free some space.")
        if "locked" in text or "busy" in text:
            return self._busy()
        return unavailable(
            "DATABASE_UNREACHABLE", f"The database {where} can't be used: {text}. Check LORALINE_DATABASE_URL and it."
        )

    def _busy(self) -> LoralineError:
        where = self._url.render_as_string(hide_password=True)
        return unavailable(
            "DATABASE_BUSY", f"The database {where} was busy for more than {_BUSY_SECONDS:.0f} s. Try again."
        )
