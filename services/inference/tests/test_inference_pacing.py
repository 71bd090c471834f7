"""The pause between two deliveries of one answer."""

from __future__ import annotations

import asyncio
import time

import pytest

from loraline.inference.config import InferenceSettings
from loraline.inference.engines import pacing
from loraline.inference.engines.pacing import Pace


async def goes_on_at_once(pace: Pace) -> bool:
    """Tell whether a rest returns without giving the event loop a turn."""
    resting = pace.rest()
    try:
        resting.send(None)
    except StopIteration:
        return True
    resting.close()
    return False


async def test_the_first_delivery_is_not_held_up() -> None:
    assert await goes_on_at_once(Pace(3600))


async def test_a_delivery_waits_for_the_next_tick() -> None:
    pace = Pace(3600)
    pace.delivered()
    assert not await goes_on_at_once(pace)


async def test_streams_slower_than_the_pause_never_rest() -> None:
    pace = Pace(0.004)
    for _ in range(3):
        pace.delivered()
        time.sleep(0.006)
        assert await goes_on_at_once(pace)


async def test_no_pause_at_all_where_it_is_switched_off() -> None:
    pace = Pace(0)
    pace.delivered()
    assert await goes_on_at_once(pace)


async def test_answers_go_on_together_once_in_a_tick_and_one_that_ends_holds_up_nobody() -> None:
    loop = asyncio.get_running_loop()
    begun, turns = loop.time(), dict.fromkeys(range(3), 0)

    async def answer(number: int) -> None:
        pace = Pace(0.02)
        while loop.time() < begun + 0.3:
            turns[number] += 1
            pace.delivered()
            await pace.rest()

    answers = [asyncio.create_task(answer(number)) for number in range(3)]
    await asyncio.sleep(0.1)
    answers[0].cancel()
    await asyncio.gather(*answers, return_exceptions=True)
    assert answers[0].cancelled()
    ticks = (loop.time() - begun) / 0.02 + 2  # fewer where the machine is busy
    assert abs(turns[1] - turns[2]) <= 1
    assert max(2, turns[0]) <= turns[1] <= ticks


def test_the_setting_reaches_the_engine_and_stays_within_five_milliseconds() -> None:
    assert 0 < InferenceSettings().engine_options().coalesce_seconds <= 0.005
    assert InferenceSettings(coalesce_seconds=0).engine_options().coalesce_seconds == 0


def test_the_pause_grows_where_ticks_come_late_and_shrinks_again_to_what_was_set() -> None:
    ticker = pacing._Ticker(0.004)
    ticker.adapt(0.0019)
    assert ticker.seconds == 0.004
    for _ in range(20):
        ticker.adapt(1.0)
    assert ticker.seconds == pytest.approx(0.064)
    ticker.adapt(0.02)
    assert ticker.seconds == pytest.approx(0.064)
    for _ in range(20):
        ticker.adapt(0.0001)
    assert ticker.seconds == 0.004


def test_the_next_tick_is_never_further_than_the_pause() -> None:
    ticker = pacing._Ticker(0.004)
    for number in range(1000):
        now = 1234.5 + number * 0.00037
        assert now < ticker.after(now) <= now + 0.004 + 1e-9
