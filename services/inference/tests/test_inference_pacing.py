"""The pause between two deliveries of one answer."""

from __future__ import annotations

import asyncio
import time

import pytest

from loraline.inference.config import InferenceSettings
from loraline.inference.engines.pacing import Pace


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were taken; none really is."""
    taken: list[float] = []

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return taken


async def test_the_first_delivery_is_not_held_up(sleeps: list[float]) -> None:
    pace = Pace(3600)
    await pace.rest()
    assert sleeps == []


async def test_a_delivery_waits_until_the_pause_since_the_last_is_over(sleeps: list[float]) -> None:
    pace = Pace(3600)
    pace.delivered()
    await pace.rest()
    assert len(sleeps) == 1
    assert 3500 < sleeps[0] <= 3600


async def test_streams_slower_than_the_pause_never_rest(sleeps: list[float]) -> None:
    pace = Pace(0.004)
    for _ in range(3):
        pace.delivered()
        time.sleep(0.006)
        await pace.rest()
    assert sleeps == []


async def test_no_pause_at_all_where_it_is_switched_off(sleeps: list[float]) -> None:
    pace = Pace(0)
    pace.delivered()
    await pace.rest()
    assert sleeps == []


def test_the_setting_reaches_the_engine_and_stays_within_five_milliseconds() -> None:
    assert 0 < InferenceSettings().engine_options().coalesce_seconds <= 0.005
    assert InferenceSettings(coalesce_seconds=0).engine_options().coalesce_seconds == 0
