"""What every ledger promises, on both kinds: a file with its index, and a table of a real Postgres."""

from __future__ import annotations

import asyncio
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DataError

from loraline.core.db.database import Database
from loraline.core.db.schema import jobs, llm_calls
from loraline.core.errors import LoralineError
from loraline.core.testing.servers import PostgresServer
from loraline.datagen.llms.answer_index import AnswerIndex
from loraline.datagen.llms.ledger import CallRecord, Ledger
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.ledger_table import TableLedger

PLAN, OTHER_PLAN = "aa" * 32, "bb" * 32
ODD = 'line\nbreak, quote ", nul \x00, 한국어 and half a pair \ud83d'


class Desk:
    """Opens ledgers of jobs, as a new process would, and deletes jobs."""

    def __init__(self, folder: Path, database: Database | None):
        self.folder, self.database = folder, database
        self._open: list[Ledger] = []

    def ledger(self, job: str = "one", source: int = 1, since: float = 0.0) -> Ledger:
        if self.database is None:
            index = AnswerIndex(self.folder / "llm-answers.db")
            ledger: Ledger = FileLedger(
                self.folder / "jobs" / job / f"llm-{source}" / "ledger.jsonl", index, since
            )  # fmt: skip
        else:
            self._make(job)
            ledger = TableLedger(self.database, job, source, since)
        self._open.append(ledger)
        return ledger

    def _make(self, job: str) -> None:
        assert self.database is not None
        with self.database.begin() as connection:
            if not connection.execute(jobs.select().where(jobs.c.name == job)).first():
                values = {"name": job, "kind": "datagen.generate", "state": 2, "spec": b"", "create_time": 1.0,
                          "update_time": 1.0}  # fmt: skip
                connection.execute(jobs.insert().values(**values))

    def delete(self, job: str) -> None:
        if self.database is None:
            shutil.rmtree(self.folder / "jobs" / job)
        else:
            with self.database.begin() as connection:
                connection.execute(jobs.delete().where(jobs.c.name == job))

    def close(self) -> None:
        for ledger in self._open:
            ledger.close()


@pytest.fixture(params=["file", "table"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    database = None
    if request.param == "table":
        server: PostgresServer = request.getfixturevalue("postgres")
        database = Database(server.new_database())
        database.migrate()
    made = Desk(tmp_path, database)
    yield made
    made.close()
    if database is not None:
        database.close()


def answered(call: int, **fields: Any) -> CallRecord:
    given = {"content": f"answer {call}", "plan": PLAN, "answered_at": time.time(), "cost": 0.5, **fields}
    return CallRecord(call, 3, f"{call:064x}", "answered", **given)


async def test_what_was_appended_comes_back_in_its_order_and_byte_for_byte(desk: Desk) -> None:
    ledger = desk.ledger()
    records = [
        answered(0, content=ODD), CallRecord(1, 4, "00", "timeout"), CallRecord(-1, 0, "", "budget"), answered(1),
        CallRecord(2, 1, "00", "refused"),
    ]  # fmt: skip
    for record in records:
        await ledger.append(record)
    assert list(desk.ledger().replay()) == records
    assert list(desk.ledger(source=2).replay()) == []
    assert list(desk.ledger("two").replay()) == []


async def test_many_at_once_keep_their_order_and_are_written_in_few_pieces(desk: Desk) -> None:
    ledger = desk.ledger()
    pieces: list[int] = []
    write: Callable[..., None] = ledger._write  # pyright: ignore[reportPrivateUsage]

    def counted(lines: Any) -> None:
        pieces.append(len(lines))
        write(lines)

    ledger._write = counted  # type: ignore[method-assign]
    ended: list[int] = []

    async def one(number: int) -> None:
        await ledger.append(answered(number))
        ended.append(number)

    await asyncio.gather(*(one(number) for number in range(1200)))
    assert ended == list(range(1200))
    assert [record.call for record in desk.ledger().replay()] == ended
    assert sum(pieces) == 1200
    assert len(pieces) <= 5  # the first alone, then all that waited
    assert ledger.waiting == 0


async def test_a_request_is_found_by_its_digest_after_it_was_read_again(desk: Desk) -> None:
    ledger = desk.ledger()
    await ledger.append(answered(7))
    again = desk.ledger()
    assert len(list(again.replay())) == 1
    for one in (ledger, again):
        found = one.find(f"{7:064x}")
        assert found is not None
        assert found.content == "answer 7"
        assert one.find(f"{8:064x}") is None


async def test_another_job_knows_the_answers_of_its_plan_by_call_number(desk: Desk) -> None:
    first, second = desk.ledger("one"), desk.ledger("two")
    for call in (3, 0, 700, 1):
        await first.append(answered(call))
    await first.append(CallRecord(2, 3, "00", "set_aside", plan=PLAN))
    await first.append(answered(5, plan=OTHER_PLAN))
    await second.append(answered(1, content="mine"))
    await asyncio.gather(*(first.append(answered(call)) for call in range(1000, 2200)))
    told = list(desk.ledger("three").known([PLAN], 0))
    calls = [record.call for record in told]
    assert calls == [0, 1, 1, 3, 700, *range(1000, 2200)]
    assert {(record.content, record.paid_by) for record in told if record.call == 1} == {
        ("answer 1", "one"), ("mine", "two"),
    }  # fmt: skip
    assert [record.call for record in second.known([PLAN], 1000)] == list(range(1000, 2200))
    assert [record.call for record in second.known([PLAN, OTHER_PLAN], 2)][:3] == [3, 5, 700]
    assert [record.call for record in first.known([PLAN], 0)] == [1]  # never its own


async def test_old_answers_copies_and_those_of_deleted_jobs_are_not_given(desk: Desk) -> None:
    first = desk.ledger("one")
    await first.append(answered(0, answered_at=time.time() - 1000))
    await first.append(answered(1))
    await desk.ledger("two").append(replace(answered(0), paid_by="one"))
    assert [record.call for record in desk.ledger("three").known([PLAN], 0)] == [0, 1]
    assert [record.call for record in desk.ledger("three", since=time.time() - 500).known([PLAN], 0)] == [1]
    assert list(desk.ledger("three", since=float("inf")).known([PLAN], 0)) == []
    first.close()
    desk.delete("one")
    assert list(desk.ledger("three").known([PLAN], 0)) == []


async def test_a_job_deleted_while_it_runs_leaves_no_rows(postgres: PostgresServer, tmp_path: Path) -> None:
    database = Database(postgres.new_database())
    database.migrate()
    desk = Desk(tmp_path, database)
    ledger = desk.ledger()
    desk.delete("one")
    with pytest.raises(LoralineError) as caught:
        await ledger.append(answered(0))
    assert caught.value.reason == "JOB_NOT_FOUND"
    with database.read() as connection:
        assert not connection.execute(llm_calls.select()).all()
    database.close()


async def test_two_writers_of_one_table_lose_nothing(postgres: PostgresServer, tmp_path: Path) -> None:
    """A worker that was presumed dead still writes down what it paid for."""
    databases = [Database(postgres.new_database())]
    databases[0].migrate()
    databases.append(Database(databases[0].engine.url.render_as_string(hide_password=False)))
    ledgers = [Desk(tmp_path, database).ledger() for database in databases]
    await asyncio.gather(*(ledgers[call % 2].append(answered(call)) for call in range(400)))
    assert sorted(record.call for record in ledgers[0].replay()) == list(range(400))
    for database in databases:
        database.close()


async def test_a_lost_index_is_filled_again_and_a_damaged_one_thrown_away(tmp_path: Path) -> None:
    desk = Desk(tmp_path, None)
    ledger = desk.ledger("one")
    await asyncio.gather(*(ledger.append(answered(call)) for call in range(1500)))
    desk.close()
    for path in tmp_path.glob("llm-answers.db*"):
        path.unlink()
    (tmp_path / "llm-answers.db").write_bytes(b"no database at all" * 100)
    assert list(desk.ledger("two").known([PLAN], 0)) == []
    again = desk.ledger("one")
    assert len(list(again.replay())) == 1500
    assert len(list(desk.ledger("two").known([PLAN], 0))) == 1500
    desk.close()


async def test_an_answer_that_does_not_stand_where_the_index_says_is_passed_over(tmp_path: Path) -> None:
    desk = Desk(tmp_path, None)
    ledger = desk.ledger("one")
    for call in range(3):
        await ledger.append(answered(call))
    path = tmp_path / "jobs" / "one" / "llm-1" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"x" * len(lines[1][:-1]) + b"\n" + lines[0])
    assert [record.call for record in desk.ledger("two").known([PLAN], 0)] == [0]
    desk.close()


async def test_a_disk_without_room_is_named_and_nothing_half_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = FileLedger(path)
    await ledger.append(answered(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(LoralineError) as caught:
            await ledger.append(answered(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.reason == "DISK_FULL"
    await ledger.append(answered(2))  # Somebody made room.
    assert [record.call for record in ledger.replay()] == [0, 2]
    ledger.close()


async def test_a_torn_line_that_cannot_be_cut_off_yet_is_cut_off_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = FileLedger(path)
    await ledger.append(answered(0))

    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", broken)
        patched.setattr("os.ftruncate", broken)
        for call in (1, 2):
            with pytest.raises(LoralineError) as caught:
                await asyncio.wait_for(ledger.append(answered(call)), 30)
            assert caught.value.reason == "DISK_FULL"
    await ledger.append(answered(3))
    assert [record.call for record in ledger.replay()] == [0, 3]
    ledger.close()


async def test_whoever_waits_hears_of_any_error_and_the_next_record_is_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = desk.ledger()

    def broken(_: Any) -> None:
        raise DataError("INSERT INTO llm_calls", {}, Exception("out of range"))

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_write", broken)
        waiting = [asyncio.create_task(ledger.append(answered(call))) for call in range(3)]
        problems = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
    assert [getattr(problem, "reason", problem) for problem in problems] == ["LEDGER_NOT_WRITTEN"] * 3
    assert "out of range" in str(problems[0]) and ledger.waiting == 0
    await ledger.append(answered(3))
    assert [record.call for record in ledger.replay()] == [3]
