"""Where the answers of all jobs stand in their ledger files, so that another job can take them over.

An index and no more: it holds no texts, the ledgers are what counts, and each of them puts its own answers in again
when it is read. So the index may lose its last entries in a power cut, and a damaged one is thrown away.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loraline.core.errors import LoralineError
from loraline.datagen.llms.ledger import CallRecord, record_of

TABLES = """
CREATE TABLE IF NOT EXISTS ledgers (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS answers (
    plan BLOB NOT NULL, call INTEGER NOT NULL, ledger INTEGER NOT NULL, position INTEGER NOT NULL,
    answered_at REAL NOT NULL, PRIMARY KEY (plan, call, ledger, position)
) WITHOUT ROWID;
"""
PAGE = 500
BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Place:
    """Where an answer stands: a ledger file and the position of its line."""

    ledger: Path
    position: int
    plan: str
    call: int
    answered_at: float

    @property
    def job(self) -> str:
        """The job that paid: ledgers lie in `jobs/<job>/llm-<n>/`."""
        return self.ledger.parent.parent.name

    def read(self) -> CallRecord | None:
        """Return the answer; None when the ledger is gone with its job, or something else stands there."""
        try:
            with self.ledger.open("rb") as file:
                file.seek(self.position)
                record = record_of(file.readline(), self.ledger.name)
        except (OSError, LoralineError):
            return None
        right = (record.plan, record.call, record.outcome) == (self.plan, self.call, "answered")
        return CallRecord(**{**record.__dict__, "paid_by": self.job}) if right else None


class AnswerIndex:
    """One SQLite file for all jobs of a service; any number of processes use it at a time."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, or no permission: it is not the content
                raise
            for name in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
                name.unlink(missing_ok=True)
            self._connection = self._open()
        self._ids: dict[Path, int] = {}
        self._forget_lost()

    def _open(self) -> sqlite3.Connection:
        # The ledger writes in a thread of its own, one batch after the other.
        connection = sqlite3.connect(
            self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )  # fmt: skip
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(TABLES)
        return connection

    def _forget_lost(self) -> None:
        """Drop the entries of ledgers that went with their jobs."""
        with self._connection:
            for number, path in self._connection.execute("SELECT id, path FROM ledgers").fetchall():
                if not Path(path).exists():
                    self._connection.execute("DELETE FROM answers WHERE ledger = ?", (number,))
                    self._connection.execute("DELETE FROM ledgers WHERE id = ?", (number,))

    def add(self, places: Iterable[Place]) -> None:
        """Add answers; those that are there already stay. An index that cannot be written is no failure of a job."""
        rows = list(places)
        if not rows:
            return
        with suppress(sqlite3.Error):  # The answers themselves are on disk; the next reading of them adds them again.
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)",
                    [
                        (bytes.fromhex(one.plan), one.call, self._id(one.ledger), one.position, one.answered_at)
                        for one in rows
                    ],
                )

    def _id(self, ledger: Path) -> int:
        if ledger not in self._ids:
            self._connection.execute("INSERT OR IGNORE INTO ledgers (path) VALUES (?)", (str(ledger),))
            found = self._connection.execute("SELECT id FROM ledgers WHERE path = ?", (str(ledger),)).fetchone()
            self._ids[ledger] = int(found[0])
        return self._ids[ledger]

    def known(self, plans: Sequence[str], first_call: int, since: float, *, but_not: Path) -> Iterator[Place]:
        """Yield where answers stand that came at `since` or later, by call number from `first_call` on."""
        marks = ", ".join("?" * len(plans))
        query = (
            "SELECT a.plan, a.call, a.position, a.answered_at, l.path, a.ledger FROM answers a JOIN ledgers l "  # noqa: S608 (marks only)
            f"ON l.id = a.ledger WHERE a.plan IN ({marks}) AND a.answered_at >= ? AND l.path != ? "
            "AND (a.call, a.ledger, a.position) > (?, ?, ?) ORDER BY a.call, a.ledger, a.position LIMIT ?"
        )
        after = (first_call - 1, 2**62, 0)
        while True:
            given = [*(bytes.fromhex(plan) for plan in plans), since, str(but_not), *after, PAGE]
            page = self._connection.execute(query, given).fetchall()
            for plan, call, position, answered_at, path, ledger in page:
                after = (call, ledger, position)
                yield Place(Path(path), position, plan.hex(), call, answered_at)
            if len(page) < PAGE:
                return

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
