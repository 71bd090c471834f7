"""What a dataset job tells of its way: a total that holds, how long it takes, and what it costs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2

from .conftest import FakeProvider, Running, completion, items
from .test_datagen_servicer import convert
from .test_llm_jobs import generate, result_of
from .test_llm_texts import page, read, recipe, request_of
from .test_source_mix import mix, template

pytestmark = pytest.mark.slow
SECONDS = 1.2
"""Of an answer: progress enters a job's events once a second."""


@pytest.fixture(autouse=True)
def one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALINE_DATAGEN_LLM_CONCURRENCY", "1")
    monkeypatch.setenv("LLM_PRICE_INPUT", "1000")
    monkeypatch.setenv("LLM_PRICE_OUTPUT", "2000")  # 10 tokens in and 20 out: 5 cents an answer


async def told(running: Running, job: job_pb2.Job) -> list[job_pb2.Progress]:
    events = running.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name))
    return [one.event.progress async for one in events if one.event.WhichOneof("event") == "progress"]


async def test_texts_give_the_total_the_time_left_and_the_cost(running: Running, provider: FakeProvider) -> None:
    provider.default = lambda body: (SECONDS, read(body))
    job = await generate(running, request_of(recipe(texts=[page(number) for number in range(5)])))
    assert result_of(job).rows_by_outcome["accepted"] == 5
    making = [one for one in await told(running, job) if one.message == "Making rows of pages"]
    assert {one.total_steps for one in making} == {5}
    assert {1, 2, 3, 4} & {one.step for one in making}, "rows on their way"
    assert all(one.fraction == pytest.approx(one.step / 5) for one in making)
    later = [one for one in making if 1 < one.step < 5]
    assert later and all(one.HasField("eta") for one in later)
    for one in later:
        assert one.metrics["cost_usd"] == pytest.approx(0.05 * one.step)
        assert one.metrics["cost_usd_expected"] == pytest.approx(0.25)
        assert 0 < one.metrics["rows_per_second"] <= 1 / SECONDS


async def test_rows_of_files_count_for_no_total_and_costs_add_up(
    running: Running, provider: FakeProvider, tmp_path: Path
) -> None:
    numbers = itertools.count()

    def slow(body: dict[str, Any]) -> tuple[float, web.Response]:
        return SECONDS, completion(json.dumps({"items": items(next(numbers), 1)}))

    provider.default = slow
    said = [{"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(50)]  # fmt: skip
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "talk.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    request = mix()
    request.sources.add(name="files", convert=convert(running.upload(tmp_path / "files")))
    request.sources.add(name="numbers", template=template(4, 9))
    for name in ("first", "last"):
        asked = datagen_pb2.LlmRecipe(recipe="instruction-response", rows=3, batch_size=1)
        request.sources.add(name=name, llm=asked)
    job = await generate(running, request)
    assert result_of(job).rows_by_outcome["accepted"] == 60
    events = await told(running, job)
    first, last = ([one for one in events if one.message == f"Making rows of {name}"] for name in ("first", "last"))
    assert {one.total_steps for one in (*first, *last)} == {10}
    assert all(4 <= one.step <= 7 for one in first) and all(7 <= one.step <= 10 for one in last)
    assert first and all("cost_usd_expected" not in one.metrics for one in first), "the last is yet to be asked"
    costs = [(one.step, one.metrics["cost_usd"]) for one in last if one.step > 7]
    assert costs == [(step, pytest.approx(0.05 * (step - 4))) for step, _ in costs] and costs
    assert job.progress.metrics["cost_usd_expected"] == pytest.approx(0.3)
