"""The asking loop against a real HTTP server: quotas, time-outs, odd answers, kill and resume."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobPaused, StopRequested
from loraline.datagen.llms.endpoint import all_from_environment, from_environment, probe
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import NoLedger
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES, find_recipe, with_schema
from loraline.datagen.llms.routes import Pace
from loraline.datagen.rows import Row

from .conftest import FakeProvider, completion, items

FAST = Pace(concurrency=1, backoff_seconds=0.02, stop_grace_seconds=5)
LIMIT = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "limit"}}


def recipe(rows: int = 6, **fields: Any) -> LlmSettings:
    return LlmSettings(RECIPES["instruction-response"], rows, **{"batch_size": 3, **fields})


async def ask(
    settings: LlmSettings, ledger: Path | None = None, hooks: Hooks | None = None, pace: Pace = FAST
) -> tuple[list[Row], Intake]:
    rows: list[Row] = []
    intake = Intake(settings, "asked", rows.append)
    book = FileLedger(ledger) if ledger else NoLedger()
    try:
        await LlmRun(settings, all_from_environment(), book, intake, 1, hooks, pace).run()
    finally:
        book.close()
    return rows, intake


def sizes(provider: FakeProvider) -> list[int]:
    return [int(body["messages"][-1]["content"].rsplit("Write ", 1)[1].split()[0]) for body in provider.requests]


async def test_rows_come_in_the_number_asked_for(provider: FakeProvider) -> None:
    rows, intake = await ask(recipe(7, topics=["sea"], personas=["a child"], few_shots=[("hi", "ho")]))
    assert len({row.messages[0]["content"] for row in rows}) == 7
    assert sizes(provider) == [3, 3, 1]
    assert (rows[0].kind, rows[0].rule, rows[0].source) == ("instruction-response", "llm:toy", "asked:call-1.1")
    assert (intake.prompt_tokens, intake.completion_tokens) == (30, 60)
    sent = provider.requests[0]
    assert sent["response_format"]["json_schema"]["schema"]["properties"]["items"]
    assert sent["temperature"] == 0.8
    assert "Topic: sea" in sent["messages"][1]["content"]


async def test_odd_answers_are_counted_and_made_up_for(provider: FakeProvider) -> None:
    provider.replies = [
        completion("I cannot do that."),
        completion("```json\n" + json.dumps(items(100, 2)) + "\n```"),
        completion(json.dumps([*items(100, 1), {"instruction": "no response"}, {"instruction": "x", "response": ""}])),
        completion('{"items": [{"instruction": "cut 1", "response": "r"}, {"instruction": "cut 2", "resp', "length"),
    ]
    rows, intake = await ask(recipe(6))
    assert len(rows) == 6
    assert intake.outcomes == {"unparsable_answer": 1, "duplicate": 1, "rejected_schema": 2}
    assert intake.rungs == {"none": 1, "fenced": 1, "whole": 3 + 1, "objects": 1}
    assert sizes(provider)[-1] == 1  # One item fitted into the answer that was cut: no more are asked for.


async def test_response_format_is_left_out_after_one_refusal(provider: FakeProvider) -> None:
    told: list[str] = []
    provider.replies = [web.json_response({"error": {"message": "response_format unsupported"}}, status=400)]
    rows, _ = await ask(recipe(6), hooks=Hooks(note=lambda reason, _: told.append(reason)))
    assert len(rows) == 6
    assert ["response_format" in body for body in provider.requests] == [True, False, False]
    assert told == ["STRUCTURED_OUTPUT_REFUSED"]
    provider.default = lambda _: web.json_response({"error": {"message": "max_tokens too big"}}, status=400)
    with pytest.raises(LoralineError, match="max_tokens too big") as caught:
        await ask(recipe(6))
    assert caught.value.reason == "ENDPOINT_REFUSED"


async def test_a_time_out_halves_the_batch_down_to_one_and_is_set_aside_then(
    provider: FakeProvider, tmp_path: Path
) -> None:
    def slow(_: object) -> tuple[float, web.Response]:
        return 1.0, web.Response()

    provider.replies = [slow, slow, slow, slow, slow]
    settings = recipe(4, batch_size=4, timeout_seconds=0.15)
    rows, intake = await ask(settings, tmp_path / "ledger.jsonl")
    assert sizes(provider)[:5] == [4, 2, 1, 1, 1]
    assert len(rows) == 4
    assert intake.outcomes == {"timeout": 2, "set_aside": 1}
    provider.replies, provider.default = [], slow
    with pytest.raises(LoralineError) as caught:
        await ask(recipe(4, batch_size=1, timeout_seconds=0.05))
    assert (caught.value.reason, caught.value.code.name) == ("ENDPOINT_TIMEOUT", "UNAVAILABLE")


async def test_a_quota_pauses_with_the_retry_time_and_everything_kept(provider: FakeProvider, tmp_path: Path) -> None:
    limited = web.json_response(LIMIT, status=429, headers={"Retry-After": "120"})
    provider.replies = [provider.default, limited]
    with pytest.raises(JobPaused) as caught:
        await ask(recipe(6), tmp_path / "ledger.jsonl")
    assert caught.value.reason == "QUOTA_EXHAUSTED"
    assert "3 of 6 rows are kept" in caught.value.message
    assert caught.value.retry_time is not None
    assert 110 < caught.value.retry_time.timestamp() - time.time() < 130
    before = len(provider.requests)
    rows, _ = await ask(recipe(6), tmp_path / "ledger.jsonl")
    assert (len(rows), len(provider.requests) - before) == (6, 1)


async def test_waiting_goes_on_and_a_daily_quota_that_comes_back_pauses(provider: FakeProvider) -> None:
    def limited(quota: str, delay: str) -> web.Response:
        error = {**LIMIT["error"], "details": [{"quotaId": quota}, {"retryDelay": delay}]}
        return web.json_response([{"error": error}], status=429)

    provider.replies = [limited("PerMinute", "0.05s"), limited("PerMinute", "0.05s")]
    rows, _ = await ask(recipe(6, quota_policy="wait"))
    assert len(rows) == 6
    provider.replies = [limited("RequestsPerDay", "0.05s"), limited("RequestsPerDay", "0.05s")]
    with pytest.raises(JobPaused):
        await ask(recipe(6, quota_policy="wait"))
    assert not provider.replies
    provider.replies = [limited("PerMinute", "90s")]
    with pytest.raises(JobPaused):
        await ask(recipe(6, quota_policy="wait", max_wait_seconds=60))


async def test_an_error_inside_a_200_counts_as_what_it_is(provider: FakeProvider) -> None:
    provider.replies = [web.json_response({"choices": None, "error": {"code": 429, "message": "rate_limit"}})]
    with pytest.raises(JobPaused):
        await ask(recipe(3))
    provider.replies = [web.json_response({"error": {"message": "upstream died"}}), web.Response(status=502)]
    rows, _ = await ask(recipe(3))
    assert len(rows) == 3


async def test_candidates_are_bounded_and_resuming_grants_them_again(provider: FakeProvider, tmp_path: Path) -> None:
    fresh, provider.default = provider.default, lambda _: completion(json.dumps(items(0, 3)))
    with pytest.raises(JobPaused) as caught:
        await ask(recipe(6, max_candidates_ratio=2), tmp_path / "ledger.jsonl")
    assert caught.value.reason == "LLM_CANDIDATES_EXHAUSTED"
    assert "3 of 6 rows are kept. To ask for 12 candidates more" in caught.value.message
    assert len(provider.requests) == 4
    provider.default = fresh
    rows, intake = await ask(recipe(6, max_candidates_ratio=2), tmp_path / "ledger.jsonl")
    assert (len(rows), intake.candidates, len(provider.requests)) == (6, 18, 6)


async def test_candidates_of_which_nothing_came_are_an_error(provider: FakeProvider) -> None:
    provider.default = lambda _: completion("No.")
    with pytest.raises(LoralineError) as caught:
        await ask(recipe(6, max_candidates_ratio=2))
    assert caught.value.reason == "LLM_CANDIDATES_EXHAUSTED"
    assert caught.value.metadata == {"accepted": "0", "candidates": "12"}
    assert "pays for none of it again" in caught.value.message


async def test_final_errors_are_typed(provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def reason(**environment: str) -> str:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            reasons = []
            for call in (ask(recipe(3)), probe(from_environment())):
                with pytest.raises(LoralineError) as caught:
                    await call
                assert environment.get("LLM_API_KEY", "sk-test") not in caught.value.message
                reasons.append(caught.value.reason)
            assert len(set(reasons)) == 1
            return reasons[0]

    assert await reason(LLM_API_KEY="sk-wrong") == "ENDPOINT_KEY_REFUSED"
    assert await reason(LLM_BASE_URL=provider.url + "/deeper") == "ENDPOINT_NOT_FOUND"
    assert await reason(LLM_BASE_URL="http://127.0.0.1:1/v1") == "ENDPOINT_UNREACHABLE"
    missing = web.json_response({"error": {"message": "The model `toy` does not exist"}}, status=404)
    provider.replies = [missing]
    with pytest.raises(LoralineError) as caught:
        await ask(recipe(3))
    assert caught.value.reason == "ENDPOINT_MODEL_NOT_FOUND"
    key = tmp_path / "key"
    key.write_text("sk-test\n")
    monkeypatch.setenv("LLM_API_KEY", "sk-wrong")
    monkeypatch.setenv("LLM_API_KEY_FILE", str(key))
    assert (await probe(from_environment()))[0] == ["toy"]
    assert "sk-test" not in repr(from_environment())
    monkeypatch.setenv("LLM_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(LoralineError, match="LLM_API_KEY_FILE"):
        from_environment()


async def test_a_stop_records_the_calls_under_way(provider: FakeProvider, tmp_path: Path) -> None:
    def stop() -> None:
        if len(provider.requests) >= 2:
            raise StopRequested("pause")

    hooks = Hooks(stopping=lambda: len(provider.requests) >= 2, check_stop=stop)
    with pytest.raises(StopRequested):
        await ask(recipe(30), tmp_path / "ledger.jsonl", hooks, Pace(concurrency=2, stop_grace_seconds=5))
    assert len(list(FileLedger(tmp_path / "ledger.jsonl").replay())) == len(provider.requests)


KILLED = """
import asyncio
from pathlib import Path
from loraline.datagen.llms.endpoint import all_from_environment
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES
from loraline.datagen.llms.routes import Pace
settings = LlmSettings(RECIPES["instruction-response"], 200, 4)
intake = Intake(settings, "asked", lambda row: None)
print("ready", flush=True)
book = FileLedger(Path({ledger!r}))
asyncio.run(LlmRun(settings, all_from_environment(), book, intake, 1, None, Pace(4, 0.05)).run())
"""


@pytest.mark.slow
async def test_killed_and_resumed_no_call_is_repeated_and_no_row_lost(provider: FakeProvider, tmp_path: Path) -> None:
    answer = provider.default
    provider.default = lambda body: (0.02, answer(body))
    path = tmp_path / "ledger.jsonl"
    script = KILLED.format(ledger=str(path))
    recorded = lost = 0
    for _ in range(3):
        seen = len(provider.requests)
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL) as process:
            while len(provider.requests) < seen + 14 and process.poll() is None:
                await asyncio.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        assert len(records) > recorded
        calls = [record["call"] for record in records]
        assert len(set(calls)) == len(calls)
        lost += len(provider.requests) - seen - (len(records) - recorded)
        recorded = len(records)
    assert 0 <= lost <= 3 * 4 + 3  # Only calls under way at the kill are asked again.
    with path.open("ab") as file:
        file.write(b'{"call": 999, "size": 4, "payl')  # A line torn by a power cut.
    rows, _ = await ask(LlmSettings(RECIPES["instruction-response"], 200, 4), path, pace=Pace(4, 0.05))
    assert len(rows) == 200
    records = list(FileLedger(path).replay())
    calls = [record.call for record in records]
    assert sorted(set(calls)) == sorted(calls)
    asked = len(provider.requests)
    again, intake = await ask(LlmSettings(RECIPES["instruction-response"], 200, 4), path)
    assert [row.to_line() for row in again] == [row.to_line() for row in rows]
    assert intake.candidates == sum(record.size for record in records)
    assert asked == len(provider.requests)


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"call": 1, "size": 1, "payload": "", "outcome": "answered"}\nrubbish\n')
    with pytest.raises(LoralineError) as caught:
        list(FileLedger(path).replay())
    assert caught.value.reason == "LEDGER_DAMAGED"


@pytest.mark.parametrize(
    ("name", "item", "messages"),
    [
        (
            "persona-dialogue",
            {"turns": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": "d"}]},
            ["a", "b", "c", "d"],
        ),
        ("commands", {"text": "go north", "command": {"act": "去"}}, ["go north", '{"act": "去"}']),
        (
            "recommendation",
            {"request": "tired", "recommend": "Rest", "challenges": [{"title": "t", "description": "d"}]},
            ["tired", '{"recommend": "Rest", "challenges": [{"title": "t", "description": "d"}]}'],
        ),
        ("extraction", {"text": "<b>1</b>", "record": {"n": 1}}, ["<b>1</b>", '{"n": 1}']),
    ],
)
async def test_recipes(provider: FakeProvider, name: str, item: dict[str, Any], messages: list[str]) -> None:
    provider.replies = [completion(json.dumps({"items": [item]}))]
    (row,), _ = await ask(LlmSettings(find_recipe(name), 1))
    assert [message["content"] for message in row.messages] == messages
    assert row.kind == name


async def test_a_schema_of_ones_own(provider: FakeProvider) -> None:
    schema = {"type": "object", "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
              "required": ["question", "answer"]}  # fmt: skip
    provider.replies = [completion(json.dumps([{"question": "q", "answer": "a"}]))]
    (row,), _ = await ask(LlmSettings(with_schema(RECIPES["instruction-response"], schema), 1))
    assert [message["content"] for message in row.messages] == ["q", "a"]
    for wrong in ({"type": "nonsense"}, {"type": "object", "properties": {"colour": {}}}):
        with pytest.raises(LoralineError) as caught:
            with_schema(RECIPES["instruction-response"], wrong)
        assert caught.value.reason == "ITEM_SCHEMA_INVALID"
