"""Limits of keys: what a minute holds, when to come back, and what a changed file does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from loraline.core.errors import LoralineError
from loraline.core.serving.auth import ANONYMOUS, KeyRing, Principal
from loraline.core.serving.key_rates import KeyRates


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refusal(rates: KeyRates, principal: Principal) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        rates.admit(principal)
    return caught.value


def test_requests_of_a_minute_then_one_every_few_seconds() -> None:
    clock = Clock()
    rates, anna = KeyRates(clock), Principal("a", "anna", ("chat",), requests_per_minute=6)
    for _ in range(6):
        rates.admit(anna)
    error = refusal(rates, anna)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_RATE_LIMITED")
    assert error.retry_after == timedelta(seconds=10)
    assert list(error.quota) == ["requests per minute"]
    clock.now += 10
    rates.admit(anna)
    refusal(rates, anna)
    clock.now += 3600  # a bucket holds a minute's worth, not an hour's
    for _ in range(6):
        rates.admit(anna)
    refusal(rates, anna)


def test_tokens_are_paid_after_the_answer_and_debts_are_waited_for() -> None:
    clock = Clock()
    rates, anna = KeyRates(clock), Principal("a", "anna", ("chat",), requests_per_minute=2, tokens_per_minute=60)
    rates.admit(anna)
    rates.spend(anna, 80)
    error = refusal(rates, anna)
    assert error.metadata["limit"] == "60 tokens per minute"
    assert error.retry_after == timedelta(seconds=21)
    clock.now += 21
    rates.admit(anna)  # the refused request cost none of the two
    refusal(rates, anna)


def test_keys_do_not_share_and_unlimited_ones_are_never_refused() -> None:
    rates = KeyRates(Clock())
    anna, ben = (Principal(name, name, ("chat",), requests_per_minute=1) for name in ("anna", "ben"))
    rates.admit(anna)
    rates.admit(ben)
    refusal(rates, anna)
    for principal in (ANONYMOUS, Principal("c", "c", ("chat",)), None):
        for _ in range(1000):
            rates.admit(principal)
            rates.spend(principal, 10**9)


def test_a_lowered_limit_holds_at_once() -> None:
    rates = KeyRates(Clock())
    rates.admit(Principal("a", "anna", ("chat",), requests_per_minute=100))
    lowered = Principal("a", "anna", ("chat",), requests_per_minute=2)
    rates.admit(lowered)
    rates.admit(lowered)
    refusal(rates, lowered)


def test_limits_are_kept_in_the_file_and_a_new_key_is_known_at_once(tmp_path: Path) -> None:
    serving, command = KeyRing(tmp_path / "k.json"), KeyRing(tmp_path / "k.json")
    assert serving.verify("lora_00000000_x") is None  # the file was looked at a moment ago
    key = command.create("anna", ["chat"], requests_per_minute=60, tokens_per_minute=1000)
    principal = serving.verify(key)
    assert principal is not None
    assert (principal.requests_per_minute, principal.tokens_per_minute) == (60, 1000)
    with pytest.raises(LoralineError) as caught:
        command.create("ben", ["chat"], tokens_per_minute=-1)
    assert caught.value.reason == "INVALID_KEY_LIMIT"


def test_keys_made_and_revoked_at_once_by_many_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    doomed = [KeyRing(path).create(f"doomed-{number}", ["chat"]) for number in range(8)]

    def make(number: int) -> str:
        return KeyRing(path).create(f"new-{number}", ["chat"])

    def revoke(number: int) -> str:
        return KeyRing(path).revoke(f"doomed-{number}").id

    with ThreadPoolExecutor(16) as pool:
        revoking = [pool.submit(revoke, number) for number in range(8)]
        made = list(pool.map(make, range(8)))
        assert len({future.result() for future in revoking}) == 8
    ring = KeyRing(path)
    assert [ring.verify(key) for key in doomed] == [None] * 8
    assert all(ring.verify(key) for key in made)
    assert {record.name for record in ring.list()} == {f"new-{number}" for number in range(8)}
