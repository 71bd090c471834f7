"""The real vLLM: its engine process killed, and stopped in its tracks, while it answers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import httpx
import psutil
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_toy import Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.testing.waiting import until
from loraline.inference.component import SERVICE

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1500), pytest.mark.vllm, pytest.mark.slow
]  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("data")
    checks = {"check_interval_seconds": 1, "check_timeout_seconds": 20, "drain_seconds": 1, "kv_cache_gib": 0.25}
    async with served_toy("vllm", toy.model, folder, **checks) as one:
        yield one


def cores() -> list[psutil.Process]:
    """Return the engine core's processes of this test, seen by their titles or commands."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "EngineCore" in " ".join(child.cmdline())]


def long_ask() -> pb.ChatRequest:
    request = ask(max_tokens=400, temperature=1.0)
    request.structured.regex = "[a-z]{390}"
    return request


async def until_health(served: Served, wanted: bool, seconds: float) -> None:
    """Wait until gRPC's health service says SERVING, or does not say it any more."""
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    async with asyncio.timeout(seconds):
        while True:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            if wanted == (answer.status == health_pb2.HealthCheckResponse.SERVING):
                return
            await asyncio.sleep(0.1)


async def test_a_quarter_of_a_gib_is_what_the_engine_takes(served: Served) -> None:
    cache = served.component.extra["host"].serving().engine._llm.vllm_config.cache_config
    token = 2 * 2 * 2 * 32 * 4  # bytes: layers, keys and values, heads, their size, float32
    assert 2**27 < cache.num_gpu_blocks * cache.block_size * token <= 2**28


@pytest.mark.parametrize(
    ("number", "cause", "reason"), [(signal.SIGKILL, "died", "ENGINE_KILLED"), (signal.SIGSTOP, "hung", "ENGINE_DEAD")]
)
async def test_a_lost_engine_tells_its_requests_and_comes_back(
    served: Served, number: int, cause: str, reason: str
) -> None:
    before = served.metric("loraline_inference_engine_restarts_total", cause=cause)
    await until_health(served, True, 60)
    [core] = cores()
    running = [served.chat(long_ask()) for _ in range(4)]
    told = [asyncio.create_task(refused(call)) for call in running]
    body = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "temperature": 0}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {served.key}"}, timeout=120) as client:
        await until(lambda: served.metric("loraline_inference_in_flight_requests") >= 4, "the questions")
        os.kill(core.pid, number)
        over_http = asyncio.create_task(client.post(f"{served.http}/v1/chat/completions", json=body))
        for error in await asyncio.gather(*told):
            assert error.code == grpc.StatusCode.UNAVAILABLE
            assert error.reason in {"ENGINE_DEAD", "MODEL_NOT_READY"}
        assert (await over_http).status_code == 503
    await until_health(served, False, 60)
    await until_health(served, True, 800)
    assert "".join(piece.delta for piece in await served.chat(ask(max_tokens=4)))
    assert served.metric("loraline_inference_engine_restarts_total", cause=cause) == before + 1
    assert not psutil.pid_exists(core.pid)
    assert len(cores()) == 1
    told = await served.call("GetCapabilities", pb.GetCapabilitiesRequest())
    assert reason in [one.reason for one in told.diagnoses]


async def test_engine_counts_no_request_after_deadlines_and_cancellations(served: Served) -> None:
    llm = served.component.extra["host"].serving().engine._llm
    calls = [served.stub.Chat(long_ask(), metadata=served.metadata()) for _ in range(3)]
    await asyncio.gather(*(call.read() for call in calls))
    deadlines = [
        served.stub.Generate(
            pb.GenerateRequest(prompt="Hi", structured=long_ask().structured, sampling=long_ask().sampling),
            metadata=served.metadata(),
            timeout=0.2,
        )
        for _ in range(3)
    ]
    for ended in await asyncio.gather(*deadlines, return_exceptions=True):
        assert isinstance(ended, grpc.aio.AioRpcError)  # type: ignore[misc]
        assert ended.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    for call in calls:
        call.cancel()
    await until(lambda: not llm.output_processor.get_num_unfinished_requests(), "the engine's requests", 20)
    await until(lambda: served.metric("loraline_inference_in_flight_requests") == 0, "the requests", 20)

    def in_core() -> float:
        from prometheus_client import REGISTRY

        return sum(
            sample.value
            for metric in REGISTRY.collect()
            if metric.name in {"vllm:num_requests_running", "vllm:num_requests_waiting"}
            for sample in metric.samples
        )

    assert await served.chat(ask(max_tokens=2))  # a step, so that the core tells its figures
    await until(lambda: in_core() == 0, "the engine core's requests", 20)
