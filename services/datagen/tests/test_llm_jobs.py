"""Jobs that ask language models, through a real server and real child processes: pauses, fail-over, cost, metrics."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2

from .conftest import FakeProvider, Running

pytestmark = pytest.mark.slow


def request_of(name: str = "asked", **fields: Any) -> datagen_pb2.GenerateDatasetRequest:
    request = datagen_pb2.GenerateDatasetRequest(name=name)
    recipe = {"recipe": "instruction-response", "rows": 30, "batch_size": 5, **fields}
    request.sources.add(name="asked", llm=datagen_pb2.LlmRecipe(**recipe))
    return request


def result_of(job: job_pb2.Job) -> datagen_pb2.DatasetResult:
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error.message
    result = datagen_pb2.DatasetResult()
    assert job.result.Unpack(result)
    return result


async def generate(running: Running, request: datagen_pb2.GenerateDatasetRequest) -> job_pb2.Job:
    return await running.finished((await running.datagen.GenerateDataset(request)).job.name)


async def resume(running: Running, name: str) -> job_pb2.Job:
    await running.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=name))
    await asyncio.sleep(0.3)
    return await running.finished(name)


def value(running: Running, name: str, **labels: str) -> float:
    return running.platform.registry.get_sample_value(f"loraline_datagen_{name}", labels) or 0.0


async def counted(running: Running, name: str, wanted: float, **labels: str) -> float:
    """Return a metric once it has the value wanted, or what it is after a while: a job's last figures follow it."""
    for _ in range(100):
        if value(running, name, **labels) >= wanted - 1e-9:
            break
        await asyncio.sleep(0.1)
    return value(running, name, **labels)


async def test_what_a_job_does_shows_in_the_services_metrics(running: Running, provider: FakeProvider) -> None:
    busy = web.json_response({"error": {"code": "rate_limit_exceeded", "message": "slow"}}, status=429)
    text = json.dumps({"items": [{"instruction": "a", "response": "b\nc"}]}).replace("\\n", "\n")
    broken = [provider.default, lambda _: busy, lambda _: _completion("No."), lambda _: _completion(text)]
    provider.replies = broken
    job = await generate(running, request_of(max_candidates_ratio=5))
    result = result_of(job)
    assert result.rows_by_outcome["unparsable_answer"] == 1
    assert result.rows_by_outcome["repaired"] == 1
    route = {"endpoint": "default", "model": "toy"}
    assert await counted(running, "rows_total", 30, outcome="accepted") == 30
    assert value(running, "rows_total", outcome="unparsable_answer") == 1
    assert value(running, "quota_errors_total", reason="rate", **route) == 1
    assert value(running, "waiting_seconds_total") > 0
    assert value(running, "requests_total", result="answered", **route) == len(provider.requests) - 1
    assert value(running, "tokens_total", direction="out", **route) == 20 * (len(provider.requests) - 1)
    figures = job.progress.metrics
    assert figures["rows_per_second"] > 0
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    assert card["sources"][0]["unparsable"][0]["reason"] == "no_json"
    rows = running.rows(result.dataset) + running.rows(result.dataset, "validation.jsonl")
    assert next(row for row in rows if row.get("repaired"))["messages"][1]["content"] == "b\nc"
    kept = running.platform.settings.data_dir / "jobs" / job.name / "llm-1" / "unparsable.jsonl"
    assert json.loads(kept.read_text())["content"] == "No."


def _completion(text: str) -> web.Response:
    from .conftest import completion

    return completion(text)


async def test_a_pause_names_the_command_to_go_on(running: Running, provider: FakeProvider) -> None:
    cooldown = {"error": {"code": "model_cooldown", "message": "locked", "reset_seconds": 459202}}
    provider.replies = [provider.default, *[lambda _: web.json_response(cooldown, status=429)] * 8]
    job = await generate(running, request_of())
    assert (job.state, job.pause.reason) == (job_pb2.JOB_STATE_PAUSED, "MODEL_COOLDOWN")
    assert f"loraline jobs resume {job.name}" in job.pause.message
    assert job.pause.retry_time.seconds - job.create_time.seconds > 400_000
    pauses = {"reason": "MODEL_COOLDOWN", "endpoint": "default", "model": "toy"}
    assert await counted(running, "pauses_total", 1, **pauses) == 1, "the alert DatagenQuotaExhausted waits for it"
    provider.replies = []  # The cooldown was stale: one call finds out.
    result_of(await resume(running, job.name))


async def test_a_cost_bound_pauses_and_resuming_grants_it_again(
    running: Running, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_PRICE_INPUT", "1000")
    monkeypatch.setenv("LLM_PRICE_OUTPUT", "2000")  # 10 tokens in and 20 out: 5 cents an answer
    job = await generate(running, request_of(max_cost_usd=0.17))
    assert (job.state, job.pause.reason) == (job_pb2.JOB_STATE_PAUSED, "BUDGET_REACHED"), job.error.message
    assert "15 of 30 rows are kept" in job.pause.message
    assert len(provider.requests) == 3
    assert job.progress.metrics["cost_usd"] == pytest.approx(0.15)
    result_of(await resume(running, job.name))
    assert len(provider.requests) == 6
    assert await counted(running, "cost_usd_total", 0.3, endpoint="default", model="toy") == pytest.approx(0.3)


async def test_a_second_key_stands_in_for_an_exhausted_one(
    running: Running, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_API_KEY", "sk-refused, sk-test")
    job = await generate(running, request_of())
    assert result_of(job).rows_by_outcome["accepted"] == 30
    events = running.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name))
    notes = [told.event.note async for told in events if told.event.HasField("note")]
    assert "ENDPOINT_KEY_REFUSED" in [note.reason for note in notes]
    assert not [note for note in notes if "sk-" in note.message]


async def test_a_failed_probe_fails_the_job_before_any_call(
    running: Running, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.models = ["other"]
    job = await generate(running, request_of())
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert "does not have the model 'toy'. It lists other." in job.error.message
    monkeypatch.setenv("LLM_BASE_URL", provider.url.removesuffix("/v1"))
    job = await generate(running, request_of())
    assert "usually ends in /v1" in job.error.message
    monkeypatch.setenv("LLM_BASE_URL", "http://127.0.0.1:9/v1")
    assert "does not answer" in (await generate(running, request_of())).error.message
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert "through the proxy" in (await generate(running, request_of())).error.message
    assert provider.requests == []
