"""Measures the job table beside the least that a database must do for it: one row written in one transaction.

`make bench NAME=jobs`. Rounds of both are interleaved, so that a busy machine slows both; the ratio is the median of
the rounds' ratios. A submitted job is two rows (record and event) with an idempotency check, a claim is an update that
finds its row plus an event; the bare statements touch one known row.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa
from google.protobuf.struct_pb2 import Struct

from loraline.core.db.database import Database
from loraline.core.jobs.model import NewJob
from loraline.core.jobs.sql_table import open_table
from loraline.core.testing.servers import ServerUnavailable, postgres_server

ROUNDS = 7
BATCH = 100
THREADS = 8
KIND = "bench.job"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "jobs.txt"
AIMS = {
    ("submits", "sqlite"): 0.40,
    ("claims", "sqlite"): 0.40,
    ("submits", "postgres"): 0.40,
    ("claims", "postgres"): 0.30,
}

bare = sa.Table(
    "bench_rows",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("state", sa.Integer, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
)


def rate(work: Callable[[int], object], threads: int = 1) -> float:
    """Return how often a second `work` could be done, given its number in the batch."""
    begin = time.perf_counter()
    if threads == 1:
        for number in range(BATCH):
            work(number)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(BATCH)))
    return BATCH / (time.perf_counter() - begin)


class Bench:
    """One database with the job tables and a bare table beside them."""

    def __init__(self, url: str):
        self.database = Database(url)
        self.database.migrate()
        bare.create(self.database.engine)
        self.table = open_table(self.database)
        self.request = Struct()
        self.request.update({"text": "x" * 400})
        self.payload = self.request.SerializeToString()
        self.round = 0

    def insert(self, number: int) -> None:
        key = self.round * 10_000 + number
        with self.database.engine.begin() as connection:
            values = {"id": key, "name": f"row-{key}", "state": 1, "payload": self.payload}
            connection.execute(bare.insert().values(**values))

    def update(self, number: int) -> None:
        key = self.round * 10_000 + number
        with self.database.engine.begin() as connection:
            connection.execute(bare.update().where(bare.c.id == key).values(state=2))

    def submit(self, number: int) -> None:
        self.table.create(NewJob(KIND, self.request, f"request-{self.round}-{number}"))

    def claim(self, number: int) -> None:
        if self.table.claim([KIND], "bench", 3600.0) is None:
            raise RuntimeError("a queued job was not claimed")

    def run(self) -> dict[str, list[float]]:
        """Return the rates of each round by name."""
        rates: dict[str, list[float]] = {name: [] for name in ("insert", "submits", "update", "claims")}
        for self.round in range(ROUNDS + 1):
            measured = {
                "insert": rate(self.insert),
                "submits": rate(self.submit),
                "update": rate(self.update),
                "claims": rate(self.claim),
            }
            if self.round > 0:  # the first one warms up
                for name, value in measured.items():
                    rates[name].append(value)
        return rates

    def run_threads(self) -> tuple[float, float]:
        """Return submits and claims a second from several threads."""
        self.round = ROUNDS + 1
        rate(lambda _: self.database.engine.connect().close(), THREADS)  # opening connections is not measured
        return rate(self.submit, THREADS), rate(self.claim, THREADS)


def report(name: str, url: str) -> tuple[list[str], bool]:
    """Measure one database; return the lines, and whether all aims were met."""
    bench = Bench(url)
    rates = bench.run()
    lines, met = [], True
    for ours, theirs in (("submits", "insert"), ("claims", "update")):
        ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
        aim = AIMS[ours, name]
        met = met and ratio >= aim
        lines.append(f"ratio {ours}_{name}_vs_bare_{theirs} {ratio:.2f} aim >={aim:.2f}")
    for key, values in rates.items():
        lines.append(f"info {name}_{key}_per_second {statistics.median(values):.0f}")
    submits, claims = bench.run_threads()
    lines.append(f"info {name}_submits_per_second_{THREADS}_threads {submits:.0f}")
    lines.append(f"info {name}_claims_per_second_{THREADS}_threads {claims:.0f}")
    bench.database.close()
    return lines, met


def main() -> int:
    """Run the benchmark on both databases, print and keep its lines."""
    with tempfile.TemporaryDirectory() as folder:
        lines, met = report("sqlite", f"sqlite:///{folder}/bench.db")
    try:
        with postgres_server() as server:
            more, met_too = report("postgres", server.new_database())
        lines, met = lines + more, met and met_too
    except ServerUnavailable as missing:
        lines.append(f"skipped postgres: {missing}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
