"""Limits that jobs share: additive increase, multiplicative decrease, the breaker, several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loraline.datagen.llms import limiter as limiter_module
from loraline.datagen.llms.limiter import Limiter
from loraline.datagen.llms.limits import BREAKER_AFTER, MEMBER_SECONDS, LimitFile, LimitMemory, LimitState


def test_each_25_answers_give_one_call_more_up_to_the_ceiling() -> None:
    state = LimitState(4.0)
    for _ in range(49):
        state.succeeded(1, 8)
    assert state.limit == 5
    state.succeeded(1000, 8)
    assert state.limit == 8


def test_only_the_first_refusal_of_a_burst_cuts() -> None:
    state = LimitState(16.0)
    assert state.refused(started=10.0, now=11.0, wait=0)
    assert state.limit == 12
    for started in (10.2, 10.9, 11.0):
        state.refused(started, now=11.5, wait=0)
    assert state.limit == 12
    state.refused(started=11.2, now=12.0, wait=0)
    assert state.limit == 9


def test_it_never_goes_below_one_and_says_when_slower_is_no_answer() -> None:
    state = LimitState(2.0)
    assert state.refused(1.0, 2.0, 0)
    assert not state.refused(3.0, 4.0, 0)
    assert state.limit >= 1


def test_refusals_in_a_row_open_the_breaker_and_an_answer_closes_it() -> None:
    state = LimitState(8.0)
    for number in range(BREAKER_AFTER - 1):
        state.refused(number + 1, number + 1.5, 0)
    assert not state.tripped
    state.refused(4, 99, 0)  # One of the same burst counts no more than its first.
    assert not state.tripped
    state.refused(100, 100, 0)
    assert state.tripped and state.closed_until > 100
    longer = state.closed_until
    state.refused(101, 101, 0)
    assert state.closed_until > longer
    assert state.may_probe("a", 200, 10)
    assert not state.may_probe("b", 205, 10)
    assert state.may_probe("b", 211, 10)
    state.succeeded(1, 8)
    assert not state.tripped and state.closed_until == 0


def test_shares_add_up_and_what_is_left_over_goes_round() -> None:
    state = LimitState(5.0)
    for member in ("a", "b", "c"):
        state.share(member, 0.0)
    seen: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    for moment in (0.0, 5.0, 10.0):
        shares = {member: state.share(member, moment) for member in seen}
        assert sum(shares.values()) == 5
        for member, share in shares.items():
            seen[member].add(share)
    assert all(shares == {1, 2} for shares in seen.values())
    assert state.share("a", 10.0 + MEMBER_SECONDS + 1) == 5  # The others are gone.


def limiter(folder: Path | None, ceiling: int = 8) -> Limiter:
    return Limiter(LimitFile(folder, "key", ceiling) if folder else LimitMemory(ceiling), ceiling)


def test_the_first_call_goes_alone(tmp_path: Path) -> None:
    one = limiter(tmp_path)
    assert one.free()
    one.begin()
    assert not one.free()
    one.succeeded()
    one.end()
    started = 0
    while one.free():
        one.begin()
        started += 1
    assert started == 8


def test_two_jobs_share_one_limit_and_feel_each_others_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiter_module, "SYNC_SECONDS", 0.0)
    one, two = limiter(tmp_path), limiter(tmp_path)
    for each in (one, two):
        each.begin()
        each.succeeded()
        each.end()

    def room(each: Limiter) -> int:
        started = 0
        while each.free():
            each.begin()
            started += 1
        for _ in range(started):
            each.end()
        return started

    assert (room(one), room(two)) == (4, 4)
    two.refused(two.begin())
    two.end()
    assert one.free() and one.in_force == 6
    assert room(one) == 3
    two.refused(time.time(), wait=30.0)
    assert not one.free()
    assert 25 < one.opens_in <= 30
    two.leave()
    three = limiter(tmp_path)  # A job that begins tries whether the break is stale.
    assert three.free()
    three.begin()
    three.succeeded()
    assert one.free()


def test_a_damaged_or_old_file_counts_as_fresh(tmp_path: Path) -> None:
    one = limiter(tmp_path)
    (path,) = tmp_path.glob("*.json")
    for content in ("", "[]", '{"limit": "x"}', '{"limit": 2.0, "members": {"gone": 1.0}}'):
        path.write_text(content)
        assert limiter(tmp_path).in_force == 8, content
    assert one.in_force == 8


def _hammer(folder: Path, rounds: int, ready: Any) -> None:
    store = LimitFile(folder, "key", 1000)
    ready.release()

    def add(state: LimitState) -> None:
        state.members["total"] = state.members.get("total", time.time() * 2)
        state.successes += 1

    for _ in range(rounds):
        store.exchange(add)


@pytest.mark.slow
def test_no_change_is_lost_between_processes_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Semaphore(0)
    workers = [context.Process(target=_hammer, args=(tmp_path, 200, ready)) for _ in range(3)]
    victim = context.Process(target=_hammer, args=(tmp_path / "other", 100_000, ready))
    for worker in (*workers, victim):
        worker.start()
    for _ in range(4):
        ready.acquire()
    time.sleep(0.2)
    os.kill(victim.pid or 0, signal.SIGKILL)
    for worker in (*workers, victim):
        worker.join()
    found = LimitFile(tmp_path, "key", 1000).exchange(lambda _state: None)
    assert found.successes == 600
    assert LimitFile(tmp_path / "other", "key", 1000).exchange(lambda _state: None).successes > 0
