"""Through real services and jobs: what was paid for once is not paid for again, by another job or another machine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import sqlalchemy as sa
from aiohttp import web

from loraline.api.datagen.v1 import datagen_pb2, datagen_pb2_grpc
from loraline.api.job.v1 import job_pb2
from loraline.core.config import CoreSettings
from loraline.core.db.schema import llm_calls
from loraline.core.testing.servers import PostgresServer

from .conftest import FakeProvider, Running, serving
from .test_llm_jobs import counted, generate, request_of, result_of, value

pytestmark = pytest.mark.slow
ROUTE = {"endpoint": "default", "model": "toy"}


async def notes(running: Running, name: str) -> list[str]:
    events = running.jobs.WatchJob(job_pb2.WatchJobRequest(name=name))
    return [told.event.note.reason async for told in events if told.event.HasField("note")]


async def test_a_refused_dataset_is_paid_for_once(running: Running, provider: FakeProvider) -> None:
    request = request_of()
    request.gate.refuse_codes.append("FEW_ROWS")
    refused = await generate(running, request)
    assert refused.state == job_pb2.JOB_STATE_FAILED
    asked = len(provider.requests)
    assert f"{asked} answers of language models are recorded" in refused.error.message
    again = await generate(running, request_of())
    assert result_of(again).rows_by_outcome["accepted"] == 30
    assert len(provider.requests) == asked
    assert await counted(running, "answers_reused_total", asked) == asked
    assert "ANSWERS_REUSED" in await notes(running, again.name)
    other = request_of("other")
    other.split.seed = 8
    result_of(await generate(running, other))
    assert len(provider.requests) == 2 * asked


async def test_used_up_candidates_pause_and_are_paid_for_once(running: Running, provider: FakeProvider) -> None:
    fresh, number = provider.default, iter(range(10**9))
    provider.default = lambda body: fresh(body) if next(number) % 3 == 0 else _no_items()
    job = await generate(running, request_of(max_candidates_ratio=1.0))
    assert (job.state, job.pause.reason) == (job_pb2.JOB_STATE_PAUSED, "LLM_CANDIDATES_EXHAUSTED")
    assert "of 30 rows are kept" in job.pause.message
    assert f"loraline jobs resume {job.name}" in job.pause.message
    asked = len(provider.requests)
    assert asked == 6
    larger = await generate(running, request_of(max_candidates_ratio=20))
    assert result_of(larger).rows_by_outcome["accepted"] == 30
    reused = await counted(running, "answers_reused_total", 6)
    assert reused == asked
    assert await counted(running, "pauses_total", 1, reason="LLM_CANDIDATES_EXHAUSTED", endpoint="", model="") == 1


def _no_items() -> web.Response:
    from .conftest import completion

    return completion("No.")


@asynccontextmanager
async def machine_apart(settings: dict[str, str]) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the service in a process of its own; yield it and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, **settings, "LORALINE_LISTEN": listen}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "loraline.datagen", env=environment)
    try:
        yield process, listen
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_another_machine_takes_a_job_over_and_repeats_no_call(
    provider: FakeProvider, postgres: PostgresServer, tmp_path: Path
) -> None:
    """Two machines share a Postgres and a store, and no disk besides. The first one dies in the middle of the job."""
    shared = {
        "database_url": postgres.new_database(), "store_url": f"file://{tmp_path / 'store'}", "metrics_listen": "",
        "auth": "off", "poll_seconds": "0.1", "lease_seconds": "3",
    }  # fmt: skip
    answer = provider.default
    provider.default = lambda body: (0.1, answer(body))
    environment = {f"LORALINE_{name.upper()}": text for name, text in shared.items()}
    async with machine_apart({**environment, "LORALINE_DATA_DIR": str(tmp_path / "a")}) as (first, address):
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            stub = datagen_pb2_grpc.DatagenServiceStub(channel)
            name = (await stub.GenerateDataset(request_of(rows=120, batch_size=2))).job.name
            async with asyncio.timeout(60):
                while len(provider.requests) < 25:
                    await asyncio.sleep(0.02)
        first.kill()
        await first.wait()
    await asyncio.sleep(1.0)  # The job's process goes with its service.
    before = len(provider.requests)
    assert before < 60
    assert not list((tmp_path / "a").rglob("ledger.jsonl"))
    settings = CoreSettings(**{**shared, "data_dir": tmp_path / "b", "listen": "127.0.0.1:0"})  # type: ignore[arg-type]
    async with serving(settings, tmp_path) as second:
        with second.platform.database.read() as connection:
            recorded = {call for (call,) in connection.execute(sa.select(llm_calls.c.call))}
        assert len(recorded) >= before - 13  # what was under way, and on its way to the database
        done = await second.finished(name, 120)
        assert result_of(done).rows_by_outcome["accepted"] == 120
        asked = Counter(_batch_of(body) for body in provider.requests)
        assert {asked[call] for call in recorded} == {1}
        assert len(provider.requests) <= 60 + 13
        # And a new job, on this machine, starts from what both have paid for.
        total = len(provider.requests)
        result_of(await generate(second, request_of("again", rows=120, batch_size=2)))
        assert len(provider.requests) == total


async def test_a_killed_process_on_postgres_repeats_only_what_was_under_way(
    provider: FakeProvider, postgres: PostgresServer, tmp_path: Path
) -> None:
    settings = CoreSettings(
        data_dir=tmp_path / "data", database_url=postgres.new_database(), listen="127.0.0.1:0", metrics_listen="",
        auth="off", poll_seconds=0.1, lease_seconds=3,
    )  # fmt: skip
    answer = provider.default
    provider.default = lambda body: (0.1, answer(body))
    async with serving(settings, tmp_path) as served:
        name = (await served.datagen.GenerateDataset(request_of(rows=80, batch_size=2))).job.name
        while len(provider.requests) < 12:
            await asyncio.sleep(0.02)
        _kill_child_of(name)
        with served.platform.database.read() as connection:
            recorded = {call for (call,) in connection.execute(sa.select(llm_calls.c.call))}
        done = await served.finished(name, 120)
        assert result_of(done).rows_by_outcome["accepted"] == 80
        assert done.attempt == 2
        asked = Counter(_batch_of(body) for body in provider.requests)
        assert len(recorded) >= 2
        assert {asked[call] for call in recorded} == {1}
        # Lost at most: the calls under way at the kill, and answers on their way to the database.
        assert 40 <= len(provider.requests) <= 40 + 4 + 2 * 4 + 1


def _batch_of(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].split("This is batch ")[1].split(";")[0]) - 1


def _kill_child_of(job: str) -> None:
    """Kill the process that does this job; it is a child of this process."""
    for entry in Path("/proc").iterdir():
        try:
            ours = f"PPid:\t{os.getpid()}\n" in (entry / "status").read_text()
            does = ours and b"loraline.core.jobs.child" in (entry / "cmdline").read_bytes()
            if does and any(job in str(link.readlink()) for link in (entry / "fd").iterdir()):
                os.kill(int(entry.name), signal.SIGKILL)
                return
        except (OSError, ValueError):
            continue
    raise AssertionError("no process does the job")


async def test_waits_time_outs_and_gauges_show_while_a_job_asks(running: Running, provider: FakeProvider) -> None:
    fresh, number = provider.default, iter(range(10**9))

    def reply(body: dict[str, Any]) -> Any:
        at = next(number)
        if at == 1:
            return 3.0, web.Response()  # longer than the time-out
        if at == 16:
            return web.json_response(
                {"error": {"code": "rate_limit_exceeded"}}, status=429, headers={"Retry-After": "1"}
            )
        return 0.3, fresh(body)

    provider.default = reply
    request = request_of(rows=120, batch_size=4, quota_policy=datagen_pb2.QUOTA_POLICY_WAIT)
    request.sources[0].llm.request_timeout.FromMilliseconds(1500)
    job = (await running.datagen.GenerateDataset(request)).job
    async with asyncio.timeout(60):  # until the job's process has begun
        while not value(running, "batch_size", **ROUTE):
            await asyncio.sleep(0.05)
    assert 1 <= value(running, "batch_size", **ROUTE) <= 4
    assert 1 <= value(running, "concurrency", **ROUTE) <= 4
    result_of(await running.finished(job.name))
    assert await counted(running, "rows_total", 120, outcome="accepted") == 120
    assert await counted(running, "requests_total", 1, result="timeout", **ROUTE) == 1
    assert value(running, "rows_total", outcome="timeout") == 1
    assert await counted(running, "waiting_seconds_total", 0.3) >= 0.3
    for _ in range(50):
        if value(running, "batch_size", **ROUTE) == 0:
            break
        await asyncio.sleep(0.1)
    assert running.platform.registry.get_sample_value("loraline_datagen_batch_size", ROUTE) is None
