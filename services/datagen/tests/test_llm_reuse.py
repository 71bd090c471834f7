"""An answer is paid for once: a later job takes over what an earlier one was given, however that one ended."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobPaused, StopRequested
from loraline.datagen.llms.answer_index import AnswerIndex
from loraline.datagen.llms.endpoint import all_from_environment
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES
from loraline.datagen.llms.routes import Pace
from loraline.datagen.rows import Row

from .conftest import FakeProvider, completion, items


def recipe(rows: int = 12, **fields: Any) -> LlmSettings:
    return LlmSettings(RECIPES["instruction-response"], rows, **{"batch_size": 3, **fields})


class Service:
    """One service's jobs, one after the other; `told` are the notes and `counted` the figures of the last one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.told: list[tuple[str, str]] = []
        self.counted: Counter[str] = Counter()
        self.intake: Intake | None = None

    async def job(
        self, name: str, settings: LlmSettings, seed: int = 1, source: str = "asked", concurrency: int = 4,
        stop_after: int = 10**9,
    ) -> list[Row]:  # fmt: skip
        rows: list[Row] = []
        self.told, self.counted, checks = [], Counter(), iter(range(10**9))
        index = AnswerIndex(self.folder / "llm-answers.db")
        ledger = FileLedger(self.folder / "jobs" / name / "llm-1" / "ledger.jsonl", index)

        def count(figure: str, amount: float, /, **_labels: object) -> None:
            self.counted[figure] += int(amount)

        def check_stop() -> None:
            if next(checks) >= stop_after:
                raise StopRequested("pause")

        hooks = Hooks(
            note=lambda reason, text: self.told.append((reason, text)), count=count, check_stop=check_stop
        )  # fmt: skip
        pace = Pace(concurrency=concurrency, backoff_seconds=0.02, stop_grace_seconds=5)
        self.intake = Intake(settings, source, rows.append)
        try:
            await LlmRun(settings, all_from_environment(), ledger, self.intake, seed, hooks, pace).run()
        finally:
            ledger.close()
        return rows


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


async def test_equal_jobs_give_equal_rows_and_the_second_asks_nothing(
    service: Service, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await service.job("one", recipe(60))
    asked = len(provider.requests)
    monkeypatch.setenv("LLM_API_KEY", "sk-refused")  # Not even the endpoint is needed.
    second = await service.job("two", recipe(60))
    assert [row.to_line() for row in second] == [row.to_line() for row in first]
    assert len(provider.requests) == asked
    assert service.counted["datagen_answers_reused"] == asked
    ((reason, text),) = service.told
    assert reason == "ANSWERS_REUSED"
    assert f"{asked} answers" in text and "Another seed asks for fresh ones" in text
    assert service.intake is not None
    assert (service.intake.reused, service.intake.answers) == (asked, asked)
    assert (service.intake.cost, service.intake.prompt_tokens) == (0.0, 0)


async def test_what_a_failed_job_paid_for_is_not_paid_again(service: Service, provider: FakeProvider) -> None:
    """The candidates are used up; a new job with more of them asks for the difference and no more."""
    fresh, numbers = provider.default, iter(range(10**9))

    def mostly_the_same(body: dict[str, Any]) -> web.Response:
        number = next(numbers)
        return fresh(body) if number % 4 == 0 else completion(json.dumps(items(900, 3)))

    provider.default = mostly_the_same
    with pytest.raises(JobPaused) as caught:
        await service.job("one", recipe(24, max_candidates_ratio=1.5))
    assert "pays for none of it again" in caught.value.message
    before = [json.dumps(body) for body in provider.requests]
    rows = await service.job("two", recipe(24, max_candidates_ratio=20))
    after = [json.dumps(body) for body in provider.requests[len(before) :]]
    assert len(rows) == 24
    assert service.intake is not None
    assert service.intake.reused == len(before) == 12
    assert service.intake.answers == len(before) + len(after)
    assert not set(before) & set(after)


async def test_other_sizes_on_the_second_way_are_no_reason_to_pay_again(
    service: Service, provider: FakeProvider
) -> None:
    """Cut answers shrink the batch at other moments than the first time."""
    fresh, numbers = provider.default, iter(range(10**9))

    def at_times_cut(body: dict[str, Any]) -> web.Response:
        body_of = fresh(body).body
        assert isinstance(body_of, bytes)
        text = json.loads(body_of)["choices"][0]["message"]["content"]
        return completion(text) if next(numbers) % 5 != 2 else completion(text[: len(text) // 2], "length")

    provider.default = at_times_cut
    first = await service.job("one", recipe(60, batch_size=7, max_candidates_ratio=9))
    assert service.intake is not None
    asked, cut = len(provider.requests), service.intake.rungs["objects"]
    assert cut >= 2
    assert await service.job("two", recipe(60, batch_size=7, max_candidates_ratio=9)) == first
    assert len(provider.requests) == asked


async def test_a_recipe_that_shows_what_it_has_takes_over_answers_too(service: Service, provider: FakeProvider) -> None:
    """What a request of self-instruct shows depends on which answer came first: bodies differ, the plan does not."""
    numbers = iter(range(10**9))

    def new(_: object) -> web.Response:
        words = [hashlib.sha256(str(next(numbers)).encode()).hexdigest() for _ in range(2)]
        return completion(json.dumps({"items": [{"instruction": f"{w}?", "response": "Yes, gladly."} for w in words]}))

    provider.default = new
    given = [("Name a bridge.", "The old one."), ("Sing.", "La.")]
    settings = LlmSettings(RECIPES["self-instruct"], 30, 5, few_shots=given, max_candidates_ratio=20)
    first = await service.job("one", settings)
    asked = len(provider.requests)
    assert await service.job("two", settings) == first
    assert len(provider.requests) == asked


async def test_fewer_rows_take_what_they_need_and_more_ask_for_the_rest(
    service: Service, provider: FakeProvider
) -> None:
    first = await service.job("one", recipe(30))
    asked = len(provider.requests)
    assert [row.to_line() for row in await service.job("two", recipe(10))] == [row.to_line() for row in first[:10]]
    assert len(provider.requests) == asked
    more = await service.job("three", recipe(60))
    assert len(more) == 60
    assert [row.to_line() for row in more[:30]] == [row.to_line() for row in first]
    assert len(provider.requests) == asked + 10


@pytest.mark.parametrize("change", ["seed", "brief", "source", "model", "address", "temperature"])
async def test_what_asks_something_else_asks_anew(
    service: Service, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    await service.job("one", recipe(9))
    asked = len(provider.requests)
    settings, seed, source = recipe(9), 1, "asked"
    if change == "seed":
        seed = 2
    elif change == "source":
        source = "other"
    elif change == "model":
        monkeypatch.setenv("LLM_MODEL", "toy-2")
    elif change == "address":
        monkeypatch.setenv("LLM_BASE_URL", provider.url.replace("127.0.0.1", "localhost"))
    else:
        settings = replace(settings, **{change: "b" if change == "brief" else 0.1})
    assert len(await service.job("two", settings, seed, source)) == 9
    assert len(provider.requests) == asked + 3
    assert service.told == []


async def test_another_key_and_other_bounds_ask_the_same(
    service: Service, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.job("one", recipe(9))
    asked = len(provider.requests)
    provider.key = "sk-new"
    monkeypatch.setenv("LLM_API_KEY", "sk-new")
    await service.job("two", recipe(9, max_candidates_ratio=9, timeout_seconds=7, quota_policy="wait", batch_size=2))
    assert len(provider.requests) == asked


async def test_stopped_while_taking_over_it_goes_on_from_there(service: Service, provider: FakeProvider) -> None:
    first = await service.job("one", recipe(600))
    asked = len(provider.requests)
    with pytest.raises(StopRequested):
        await service.job("two", recipe(600), stop_after=2)
    assert service.intake is not None
    assert 0 < service.intake.accepted < 600
    rows = await service.job("two", recipe(600))
    assert [row.to_line() for row in rows] == [row.to_line() for row in first]
    assert len(provider.requests) == asked


async def test_the_cost_bound_is_for_what_is_new(
    service: Service, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_PRICE_INPUT", "1000")
    monkeypatch.setenv("LLM_PRICE_OUTPUT", "2000")  # 10 tokens in and 20 out: 5 cents an answer
    with pytest.raises(JobPaused) as caught:
        await service.job("one", recipe(30, max_cost_usd=0.22))
    assert caught.value.reason == "BUDGET_REACHED"
    asked = len(provider.requests)
    assert asked == 4
    with pytest.raises(JobPaused):
        await service.job("two", recipe(30, max_cost_usd=0.22))
    assert service.intake is not None
    assert service.intake.reused == asked
    assert len(provider.requests) == 2 * asked


async def test_an_endpoint_that_refuses_in_the_middle_keeps_the_rows(
    service: Service, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing() -> Iterator[web.Response]:
        yield web.json_response({"error": {"message": "no", "code": "invalid_api_key"}}, status=401)
        yield web.json_response({"error": {"message": "forbidden"}}, status=403)
        yield web.json_response({"error": {"message": "The model `toy` does not exist"}}, status=404)
        yield web.json_response({"error": {"message": "gone"}}, status=410)

    reasons = ["ENDPOINT_KEY_REFUSED", "ENDPOINT_KEY_REFUSED", "ENDPOINT_MODEL_NOT_FOUND", "ENDPOINT_REFUSED"]
    for number, (reply, reason) in enumerate(zip(refusing(), reasons, strict=True)):
        provider.replies = [provider.default, provider.default, reply]
        with pytest.raises(JobPaused) as caught:
            await service.job(f"job-{number}", recipe(12), seed=number + 10, concurrency=1)
        assert caught.value.reason == reason
        assert "6 of 12 rows are kept. To go on: loraline jobs resume" in caught.value.message
        asked = len(provider.requests)
        assert len(await service.job(f"job-{number}", recipe(12), seed=number + 10)) == 12
        assert len(provider.requests) == asked + 2
    provider.replies = [web.json_response({"error": {"message": "no"}}, status=401)]
    with pytest.raises(LoralineError) as failed:  # There is nothing to keep.
        await service.job("new", recipe(12), seed=99)
    assert failed.value.reason == "ENDPOINT_KEY_REFUSED"
