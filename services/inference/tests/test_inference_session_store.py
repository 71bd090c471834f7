"""What the session store promises, on SQLite and on a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from loraline.core.db.database import Database
from loraline.core.db.schema import session_messages
from loraline.core.errors import LoralineError
from loraline.inference.sessions.record import SessionLimits, SessionRecord
from loraline.inference.sessions.store import SessionStore

pytest_plugins = ["loraline.core.testing.fixtures"]
LIMITS = SessionLimits(3600, 86400, max_per_key=3, max_turns=4, max_bytes=100, lease_seconds=60)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path}/a.db"
    database = Database(url if request.param == "sqlite" else request.getfixturevalue("postgres").new_database())
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def store(database: Database, clock: Clock) -> SessionStore:
    return SessionStore(database, LIMITS, clock)


def make(store: SessionStore, owner: str = "anna", ttl: float = 3600) -> SessionRecord:
    return store.create(owner, "toy", "tales", "Be brief.", ttl)


def turn(store: SessionStore, name: str, text: str, owner: str = "anna") -> None:
    store.claim(owner, name, "t", len(text))
    store.keep(name, "t", [{"role": "user", "content": text}, {"role": "assistant", "content": f"re {text}"}])


def reason(call: object, *args: object) -> str:
    with pytest.raises(LoralineError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.reason


def test_turns_come_back_in_order(store: SessionStore) -> None:
    name = make(store).name
    for text in ("바다", "harbour", "灯塔"):
        turn(store, name, text)
    found = store.get("anna", name)
    assert [[message["content"] for message in one] for one in found.history] == [
        ["바다", "re 바다"], ["harbour", "re harbour"], ["灯塔", "re 灯塔"],
    ]  # fmt: skip
    assert (found.turns, found.size_bytes, found.category) == (3, 2 * (6 + 7 + 6) + 9, "tales")
    assert store.list("anna", 10) == [SessionRecord(**{**vars(found), "history": ()})]


def test_a_claim_is_one_turn_at_a_time_and_ends_when_its_server_died(store: SessionStore, clock: Clock) -> None:
    name = make(store).name
    store.claim("anna", name, "first", 0)
    assert reason(store.claim, "anna", name, "second", 0) == "SESSION_BUSY"
    clock.now += 59
    assert store.renew(name, "first")
    clock.now += 59
    assert reason(store.claim, "anna", name, "second", 0) == "SESSION_BUSY"
    clock.now += 2
    store.claim("anna", name, "second", 0)
    assert not store.renew(name, "first")
    assert reason(store.keep, name, "first", [{"role": "user", "content": "late"}]) == "SESSION_CHANGED"
    store.release(name, "first")  # not its claim any more
    assert reason(store.claim, "anna", name, "third", 0) == "SESSION_BUSY"
    store.release(name, "second")
    assert store.claim("anna", name, "third", 0).history == ()


def test_reset_and_delete_take_the_claim_and_the_messages(store: SessionStore, database: Database) -> None:
    kept, gone = make(store).name, make(store).name
    for name in (kept, gone):
        turn(store, name, "hello")
        store.claim("anna", name, "running", 0)
    assert store.reset("anna", kept).history == ()
    store.delete("anna", gone)
    for name in (kept, gone):
        assert reason(store.keep, name, "running", [{"role": "user", "content": "late"}]) == "SESSION_CHANGED"
    with database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(session_messages)).scalar() == 0
    turn(store, kept, "again")
    assert store.get("anna", kept).turns == 1


def test_everything_is_the_owners_alone(store: SessionStore) -> None:
    name = make(store).name
    for call in (store.get, store.reset, store.delete):
        assert reason(call, "ben", name) == "SESSION_NOT_FOUND"
    assert reason(store.claim, "ben", name, "t", 0) == "SESSION_NOT_FOUND"
    assert store.list("ben", 10) == []
    assert store.get("anna", name).name == name


def test_use_puts_the_end_off_and_what_expired_is_gone_and_purged(store: SessionStore, clock: Clock) -> None:
    used, unused, running = (make(store, ttl=100).name for _ in range(3))
    clock.now += 99
    turn(store, used, "hello")
    store.claim("anna", running, "t", 0)
    clock.now += 50
    assert store.count() == 1
    assert reason(store.get, "anna", unused) == "SESSION_NOT_FOUND"
    assert reason(store.claim, "anna", unused, "t", 0) == "SESSION_NOT_FOUND"
    assert store.purge() == 1  # the running turn's session waits for its claim to end
    store.keep(running, "t", [{"role": "user", "content": "done"}])
    assert {record.name for record in store.list("anna", 10)} == {used, running}
    clock.now += 101
    assert (store.purge(), store.count(), store.purge()) == (2, 0, 0)


def test_bounds(store: SessionStore, clock: Clock) -> None:
    name = make(store).name
    for _ in range(2):
        make(store, ttl=10)
    assert reason(make, store) == "TOO_MANY_SESSIONS"
    make(store, "ben")
    clock.now += 11  # two expired, purged or not
    make(store)
    with pytest.raises(LoralineError) as caught:
        store.claim("anna", name, "t", 101)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_FULL")
    for number in range(4):  # the refused claim was undone
        turn(store, name, str(number))
    assert reason(store.claim, "anna", name, "t", 1) == "SESSION_FULL"
    store.reset("anna", name)
    turn(store, name, "fresh")


def test_pages_hold_while_sessions_come(store: SessionStore) -> None:
    names = [make(store).name for _ in range(3)]
    first = store.list("anna", 2)
    assert [record.name for record in first] == [names[2], names[1]]
    store.delete("anna", names[2])
    make(store)
    assert [record.name for record in store.list("anna", 2, first[-1].id)] == [names[0]]


def test_of_many_claims_at_once_one_wins(store: SessionStore) -> None:
    name = make(store).name

    def claim(number: int) -> bool:
        try:
            store.claim("anna", name, f"t{number}", 0)
        except LoralineError as error:
            assert error.reason == "SESSION_BUSY"
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(claim, range(24))) == 1
