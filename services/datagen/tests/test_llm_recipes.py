"""Prompts, seed rotation, recipes that build on given instructions, and what happens at a limit, step by step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.llms.endpoint import all_from_environment
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import CallRecord, NoLedger, payload_digest
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.prompting import EVOLUTIONS, LlmSettings, Prompter
from loraline.datagen.llms.recipes import RECIPES
from loraline.datagen.llms.request import llm_of
from loraline.datagen.llms.routes import Pace
from loraline.datagen.quality.rules.language import is_written_in
from loraline.datagen.rows import Row

from .conftest import FakeProvider, completion, items

FIELDS = ["sea", "stone", "bread", "letters", "roofs", "snow", "clocks", "wells", "rope", "salt", "glass", "moss"]


async def run(
    settings: LlmSettings, ledger: Path | None = None, hooks: Hooks | None = None, **pace: Any
) -> tuple[list[Row], Intake]:
    rows: list[Row] = []
    intake, book = Intake(settings, "asked", rows.append), FileLedger(ledger) if ledger else NoLedger()
    fast = Pace(**{"concurrency": 1, "backoff_seconds": 0.02, "stop_grace_seconds": 5, **pace})
    try:
        await LlmRun(settings, all_from_environment(), book, intake, 1, hooks, fast).run()
    finally:
        book.close()
    return rows, intake


def question(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_all_combinations_of_seeds_come_before_one_comes_again() -> None:
    settings = LlmSettings(RECIPES["commands"], 1, topics="abcd", personas="xyz", styles="12345")
    prompter = Prompter(settings, seed=7)
    drawn = [prompter.question(call, 1).split("\n\n")[:3] for call in range(60)]
    assert len({tuple(parts) for parts in drawn}) == 60
    assert prompter.question(60, 1).split("\n\n")[:3] == drawn[0]
    others = [Prompter(settings, seed=8).question(call, 1).split("\n\n")[:3] for call in range(60)]
    assert others != drawn


def test_bodies_are_the_same_bytes_for_the_same_arguments_and_right_json() -> None:
    settings = LlmSettings(RECIPES["extraction"], 1, brief='say "so"', few_shots=[("q\n", "a")], max_tokens=9)
    body = Prompter(settings, 1).body("m", 3, 2, structured=True)
    assert body == Prompter(settings, 1).body("m", 3, 2, structured=True)
    sent = json.loads(body)
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("m", 0.8, 9)
    assert sent["response_format"]["type"] == "json_schema"
    assert 'say "so"' in question(sent) and "Write 2 different items" in question(sent)
    assert "response_format" not in json.loads(Prompter(settings, 1).body("m", 3, 2, structured=False))


async def test_self_instruct_shows_instructions_and_turns_down_what_is_like_them(provider: FakeProvider) -> None:
    made = itertools.cycle(FIELDS)
    numbers = itertools.count()

    def reply(_: dict[str, Any]) -> web.Response:
        field, number = next(made), next(numbers)
        near = {"instruction": "Name three uses of old ropes, please.", "response": "Nets, swings, doormats."}
        far = {"instruction": f"{field * 4} {number * 7919}: what would you ask about {field}?", "response": field}
        return completion(json.dumps({"items": [near, far]}))

    provider.default = reply
    settings = LlmSettings(
        RECIPES["self-instruct"], 8, 2, few_shots=[("Name three uses of old ropes.", "Nets.")], max_candidates_ratio=5
    )
    rows, intake = await run(settings)
    assert len(rows) == 8
    assert intake.outcomes["rejected_similar"] >= 7
    assert "- Name three uses of old ropes." in question(provider.requests[0])
    assert any(rows[0].messages[0]["content"] in question(body) for body in provider.requests[1:])


async def test_evol_instruct_rewrites_given_and_made_instructions_and_drops_refusals(provider: FakeProvider) -> None:
    numbers = itertools.count()

    def reply(_: dict[str, Any]) -> web.Response:
        field = FIELDS[next(numbers) % len(FIELDS)]
        refusal = {"instruction": f"Explain {field[::-1]} {field}", "response": "I'm sorry, I cannot."}
        good = {"instruction": f"{field * 3} and {field[::-1]}?", "response": f"About {field}."}
        return completion(json.dumps([refusal, good]))

    provider.default = reply
    settings = LlmSettings(
        RECIPES["evol-instruct"], 6, 2, few_shots=[("How is bread made?", "With time.")], max_candidates_ratio=6
    )
    rows, intake = await run(settings)
    assert len(rows) == 6 and intake.outcomes["rejected_refusal"] >= 5
    ways = {way for way in EVOLUTIONS for body in provider.requests if way in question(body)}
    assert len(ways) == len(EVOLUTIONS)
    assert any("1. How is bread made?" in question(body) for body in provider.requests)


def test_recipes_that_need_instructions_say_so_and_languages_are_checked() -> None:
    for name in ("self-instruct", "evol-instruct"):
        with pytest.raises(LoralineError) as caught:
            llm_of(datagen_pb2.LlmRecipe(recipe=name, rows=1), "llm")
        assert caught.value.reason == "FEW_SHOTS_MISSING"
    with pytest.raises(LoralineError) as caught:
        llm_of(datagen_pb2.LlmRecipe(recipe="commands", rows=1, language="xx"), "llm")
    assert caught.value.reason == "LANGUAGE_UNKNOWN"


@pytest.mark.parametrize(
    ("text", "language", "fits"),
    [
        ("오늘은 바다를 걸어요 API", "ko", True), ("오늘 我们 去 海边 散步吧", "ko", False), ("hello", "ko", False),
        ("我们去海边", "zh", True), ("海へ行きましょう", "zh", False), ("A walk by the sea, 3 km.", "en", True),
        ("A walk 바다에서 오늘", "en", False), ("123 …", "ko", True),
    ],
)  # fmt: skip
def test_languages_by_their_letters(text: str, language: str, fits: bool) -> None:
    assert is_written_in(text, language) is fits


async def test_rows_in_another_language_are_turned_down(provider: FakeProvider) -> None:
    korean = [{"instruction": f"바다는 어디에 있나요 {n}", "response": "저기에 있어요"} for n in range(2)]
    provider.replies = [completion(json.dumps([*items(0, 1), *korean]))]
    rows, intake = await run(LlmSettings(RECIPES["instruction-response"], 2, 3, language="ko"))
    assert len(rows) == 2 and intake.outcomes["rejected_wrong_language"] == 1
    assert "in Korean" in question(provider.requests[0])


async def test_a_burst_makes_it_slower_and_only_a_lasting_limit_pauses(provider: FakeProvider) -> None:
    told: list[tuple[str, float]] = []
    hooks = Hooks(count=lambda name, value, /, **_: told.append((name, value)))

    def busy(_: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"code": "rate_limit_exceeded", "message": "slow"}}, status=429)

    provider.replies = [provider.default, busy, busy]
    rows, _ = await run(LlmSettings(RECIPES["instruction-response"], 40, 2), hooks=hooks, concurrency=8)
    assert len(rows) == 40
    assert sum(value for name, value in told if name == "datagen_quota_errors") == 2
    provider.replies, provider.default = [provider.default], busy
    with pytest.raises(JobPaused) as caught:
        await run(LlmSettings(RECIPES["instruction-response"], 40, 2), concurrency=8)
    assert caught.value.reason == "RATE_LIMITED"
    assert "To go on: loraline jobs resume" in caught.value.message


async def test_an_exhausted_quota_pauses_at_once_however_many_calls_are_allowed(provider: FakeProvider) -> None:
    spent = {"error": {"code": "insufficient_quota", "message": "no credit"}}
    provider.replies, good = [provider.default], provider.default
    provider.default = lambda _: web.json_response(spent, status=429)
    with pytest.raises(JobPaused) as caught:
        await run(LlmSettings(RECIPES["instruction-response"], 40, 2, quota_policy="wait"), concurrency=8)
    assert (caught.value.reason, caught.value.retry_time) == ("QUOTA_EXHAUSTED", None)
    assert len(provider.requests) <= 1 + 8
    provider.default = good


async def test_an_identical_request_is_answered_from_the_ledger(provider: FakeProvider, tmp_path: Path) -> None:
    settings = LlmSettings(RECIPES["instruction-response"], 3, 3)
    body = Prompter(settings, 1).body("toy", 1, 3, structured=True)
    book = FileLedger(tmp_path / "ledger.jsonl")
    await book.append(CallRecord(0, 3, "00", "set_aside"))
    known = json.dumps(items(0, 3))
    await book.append(CallRecord(-1, 0, payload_digest(body), "answered", known, "stop", "toy", 10, 20))
    book.close()
    rows, intake = await run(settings, tmp_path / "ledger.jsonl")
    assert len(rows) == 3 and provider.requests == []
    assert intake.prompt_tokens == 10


async def test_a_cut_answer_keeps_its_whole_items_and_the_batch_shrinks_and_grows_back(provider: FakeProvider) -> None:
    cut = json.dumps(items(1000, 4))[:-25]
    provider.replies = [completion(cut, "length")]
    rows, _ = await run(LlmSettings(RECIPES["instruction-response"], 80, 8, max_candidates_ratio=5))
    asked = [int(question(body).rsplit("Write ", 1)[1].split()[0]) for body in provider.requests]
    assert asked[:3] == [8, 3, 3]
    assert max(asked[3:]) > 3
    assert len(rows) == 80
