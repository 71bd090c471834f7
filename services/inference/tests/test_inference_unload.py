"""An adapter that is unloaded while it answers: it leaves afterwards, and nobody else waits for that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio
from counting_engine import TOY, CountingEngine, MakeHost, answer, until

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.errors import LoralineError
from loraline.core.serving.component import Platform
from loraline.inference.engines.port import EngineDead
from loraline.inference.host import ModelHost

pytestmark = pytest.mark.asyncio
ADAPTER = artifact_pb2.ARTIFACT_KIND_ADAPTER


@pytest.fixture
def refs(platform: Platform, toy: Any) -> dict[str, ArtifactRef]:
    return {name: platform.library.publish(ADAPTER, name, toy.adapters[name]).ref for name in ("mareva", "selkie")}


@pytest_asyncio.fixture
async def host(make_host: MakeHost, refs: dict[str, ArtifactRef]) -> ModelHost:
    """A host with `mareva` loaded, on an engine that waits for its gate."""
    host = make_host()
    await host.load_model(TOY)
    await host.load_adapter(refs["mareva"])
    return host


async def leaving(host: ModelHost) -> tuple[CountingEngine, asyncio.Task[str], asyncio.Task[None]]:
    """Return the engine, a long answer of `mareva`, and its unloading, which waits for that answer."""
    engine = CountingEngine.started[-1]
    engine.gate.clear()
    running = asyncio.create_task(answer(host, "mareva"))
    await until(lambda: engine.running == 1)
    unloading = asyncio.create_task(host.unload_adapter("mareva"))
    await until(lambda: not host.serving().adapters.list())
    return engine, running, unloading


async def test_a_long_answer_of_a_leaving_adapter_blocks_no_other_load(
    host: ModelHost, refs: dict[str, ArtifactRef]
) -> None:
    engine, running, unloading = await leaving(host)
    async with asyncio.timeout(30):
        await host.load_adapter(refs["selkie"])  # before the answer ends
    with pytest.raises(LoralineError) as refused:
        await answer(host, "mareva")
    assert refused.value.reason == "MODEL_NOT_SERVED"
    assert not running.done()
    assert not unloading.done()
    engine.gate.set()
    assert await running == "0 1 2 "
    await unloading
    assert len(engine.adapters) == 2  # the base and selkie
    assert await answer(host, "selkie") == "0 1 2 "


async def test_the_place_of_a_leaving_adapter_is_taken_until_it_is_gone(
    make_host: MakeHost, refs: dict[str, ArtifactRef]
) -> None:
    host = make_host(max_loaded_adapters=1)
    await host.load_model(TOY)
    await host.load_adapter(refs["mareva"])
    engine, running, unloading = await leaving(host)
    with pytest.raises(LoralineError) as busy:
        await host.load_adapter(refs["selkie"])
    assert busy.value.reason == "ADAPTER_PLACES_BUSY"
    assert len(engine.adapters) == 2  # the base and mareva: no more than the engine was told
    engine.gate.set()
    await asyncio.gather(running, unloading)
    await host.load_adapter(refs["selkie"])


async def test_a_leaving_adapter_that_is_loaded_again_stays(host: ModelHost, refs: dict[str, ArtifactRef]) -> None:
    engine, running, unloading = await leaving(host)
    await host.load_adapter(refs["mareva"])
    assert [one.name for one in host.serving().adapters.list()] == ["mareva:v1"]
    engine.gate.set()
    await asyncio.gather(running, unloading)
    assert await answer(host, "mareva") == "0 1 2 "
    await host.unload_adapter("mareva")
    assert list(engine.adapters) == [""]


async def test_a_caller_who_goes_away_leaves_no_adapter_behind(host: ModelHost, refs: dict[str, ArtifactRef]) -> None:
    engine, running, unloading = await leaving(host)
    unloading.cancel()
    await asyncio.gather(unloading, return_exceptions=True)
    engine.gate.set()
    await running
    await until(lambda: list(engine.adapters) == [""])
    await host.load_adapter(refs["mareva"])
    assert await answer(host, "mareva") == "0 1 2 "


async def test_an_engine_that_died_meanwhile_ends_the_unloading(host: ModelHost) -> None:
    engine, running, unloading = await leaving(host)

    async def dead(_: str) -> None:
        raise EngineDead("killed")

    engine.unload_adapter = dead  # type: ignore[method-assign]
    engine.alive = False
    engine.gate.set()
    with pytest.raises(LoralineError):
        await running
    await unloading


async def test_swaps_are_counted(make_host: MakeHost, refs: dict[str, ArtifactRef]) -> None:
    host = make_host(max_loaded_adapters=1)
    await host.load_model(TOY)
    for name in ("mareva", "selkie", "mareva"):
        await answer(host, name)
    assert host._metrics.adapter_swaps._value.get() == 2  # pyright: ignore[reportPrivateUsage]
