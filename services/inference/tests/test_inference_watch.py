"""Readiness means that it generates: hung and dead engines, on an engine that only counts."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import TOY, CountingEngine, MakeHost, answer, until

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER
from loraline.core.errors import LoralineError
from loraline.core.serving.component import Platform
from loraline.inference.engine_watch import Backoff
from loraline.inference.engines.port import EngineOptions, EngineRequest, Piece
from loraline.inference.host import ModelHost

QUICK = {"check_interval_seconds": 0.05, "check_timeout_seconds": 0.3}


def engine() -> CountingEngine:
    return CountingEngine.started[-1]


def restarts(host: ModelHost, cause: str) -> float:
    return host._metrics.engine_restarts.labels(cause=cause)._value.get()


async def test_a_hung_engine_is_not_ready_and_its_requests_are_told(make_host: MakeHost) -> None:
    host = make_host(**QUICK)
    await host.start()
    await host.load_model(TOY)
    first = engine()
    first.gate.clear()
    running = [asyncio.create_task(answer(host)) for _ in range(5)]
    seen: list[str] = []

    async def look() -> None:
        while True:
            seen.append(host.why_not_ready)
            await asyncio.sleep(0.005)

    looking = asyncio.create_task(look())
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(outcome, LoralineError)
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
    await until(lambda: engine() is not first and not host.why_not_ready)
    looking.cancel()
    assert any(seen)  # not ready in between, and said why
    assert await answer(host) == "0 1 2 "
    assert (first.alive, restarts(host, "hung"), restarts(host, "died")) == (False, 1, 0)


async def test_a_busy_engine_whose_check_waits_in_its_queue_is_well(make_host: MakeHost) -> None:
    host = make_host(**QUICK)
    await host.start()
    await host.load_model(TOY)
    serving, first = host.serving(), engine()
    first.gate.clear()  # the check gets no token for three time-outs, but other requests do
    for _ in range(60):
        serving.last_token = asyncio.get_running_loop().time()
        await asyncio.sleep(0.015)
    assert engine() is first
    assert not host.why_not_ready
    first.gate.set()


async def test_checks_are_left_out_while_requests_get_tokens_and_leave_no_request_behind(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, looks, gaps = 0, 0, []
    generate, healthy = CountingEngine.generate, CountingEngine.healthy

    async def counted(self: CountingEngine, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        nonlocal checks
        checks += request.request_id.startswith("ready-")
        before = time.monotonic()
        async with aclosing(generate(self, request)) as pieces:
            async for piece in pieces:
                await asyncio.sleep(0.01)
                if not request.request_id.startswith("ready-"):
                    gaps.append(time.monotonic() - before)
                before = time.monotonic()
                yield piece

    async def looked(self: CountingEngine) -> bool:
        nonlocal looks
        looks += 1
        return await healthy(self)

    host = make_host(check_interval_seconds=0.25, check_timeout_seconds=30)
    await host.start()
    await host.load_model(TOY)
    monkeypatch.setattr(CountingEngine, "generate", counted)
    monkeypatch.setattr(CountingEngine, "healthy", looked)
    begun = host.serving().last_token
    await until(lambda: checks >= 2)  # idle
    assert host.serving().last_token == begun  # checks are nobody's requests
    asked = asyncio.create_task(answer(host, tokens=480))
    await until(lambda: bool(gaps) and engine().running == 1)
    checks = looks = 0
    gaps.clear()
    await until(lambda: looks >= 5)
    assert not asked.done()
    # None, but where this machine stood still for so long that the answer itself got no token.
    assert checks <= sum(gap >= 0.25 for gap in gaps)
    asked.cancel()
    await until(lambda: engine().running == 0)
    checks = 0
    await until(lambda: checks >= 1)  # idle again
    await until(lambda: engine().running == 0)
    assert not host.why_not_ready


async def test_an_engine_that_keeps_dying_is_started_with_growing_waits(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    start = CountingEngine.start

    async def dying(self: CountingEngine, folder: Path, options: EngineOptions) -> None:
        starts.append(asyncio.get_running_loop().time())
        await start(self, folder, options)
        if 1 < len(starts) < 7:
            asyncio.get_running_loop().call_later(0.05, setattr, self, "alive", False)

    monkeypatch.setattr(CountingEngine, "start", dying)
    host = make_host(**QUICK)
    await host.start()
    await host.load_model(TOY)
    engine().alive = False
    await until(lambda: len(starts) == 7 and not host.why_not_ready)
    waits = [after - before for before, after in itertools.pairwise(starts[1:])]
    assert waits[-1] > waits[0]
    assert waits[-1] >= 0.4  # 0.05 doubled three times
    assert await answer(host) == "0 1 2 "
    assert restarts(host, "died") == 6


@pytest.mark.parametrize("cause", ["died", "hung", "out of memory"])
async def test_an_engine_that_is_lost_five_times_comes_back_five_times(
    make_host: MakeHost, platform: Platform, toy: Any, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room, start = 0, CountingEngine.start

    async def starting(self: CountingEngine, folder: Path, options: EngineOptions) -> None:
        nonlocal no_room
        if no_room:
            no_room -= 1
            raise RuntimeError("CUDA error: out of memory")
        await start(self, folder, options)

    monkeypatch.setattr(CountingEngine, "start", starting)
    host = make_host(check_interval_seconds=0.1, check_timeout_seconds=1.0, restart_backoff_seconds=0.001)
    await host.start()
    await host.load_model(TOY)
    await host.load_adapter(platform.library.publish(ARTIFACT_KIND_ADAPTER, "mareva", toy.adapters["mareva"]).ref)
    for number in range(5):
        lost = engine()
        lost.gate.clear()
        running = [asyncio.create_task(answer(host, name)) for name in ("", "mareva", "mareva")]
        await until(lambda lost=lost: lost.running >= 3)
        no_room = int(cause == "out of memory")  # for the next one too
        if cause != "hung":
            lost.alive = False
            lost.gate.set()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(outcome, LoralineError), number
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
        await until(lambda lost=lost: engine() is not lost and not host.why_not_ready)
        assert [await answer(host, name) for name in ("", "mareva")] == ["0 1 2 "] * 2
        assert [one.alive for one in CountingEngine.started].count(True) == 1
        assert (lost.running, len(engine().adapters)) == (0, 2)
    assert restarts(host, "hung" if cause == "hung" else "died") == 5
    assert len(CountingEngine.started) == 1 + (10 if cause == "out of memory" else 5)


async def test_a_restart_that_fails_is_tried_again_and_leaves_room_for_another_model(
    make_host: MakeHost, platform: Any
) -> None:
    host = make_host(**QUICK)
    await host.start()
    await host.load_model(TOY)
    CountingEngine.fail_folder = "toy"
    engine().alive = False
    await until(lambda: len(CountingEngine.started) >= 3)
    with pytest.raises(LoralineError) as caught:
        host.serving()
    assert (caught.value.code, caught.value.retry_after is not None) == (grpc.StatusCode.UNAVAILABLE, True)
    CountingEngine.fail_folder = ""
    await host.load_model(TOY, "other")
    await until(lambda: not host.why_not_ready)
    assert await answer(host) == "0 1 2 "


async def test_backoff_doubles_to_a_minute_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    now = [1000.0]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("loraline.inference.engine_watch.asyncio.sleep", sleep)
    monkeypatch.setattr("loraline.inference.engine_watch.time.monotonic", lambda: now[0])
    backoff = Backoff(1.0)
    for _ in range(9):
        await backoff.wait()
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    now[0] += 61
    await backoff.wait()
    assert waits[-1] == 0
