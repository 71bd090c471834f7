"""Rows that the gate would refuse are mended or turned down as they come in, so that a paid run ends with its rows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from aiohttp import web
from google.protobuf import json_format, struct_pb2

from loraline.api.datagen.v1 import datagen_pb2
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import CallRecord
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES, with_schema
from loraline.datagen.quality.gate import Gate
from loraline.datagen.quality.rows import RowCheck
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.rows import Row

from .conftest import FakeProvider, Running, completion
from .test_llm_jobs import counted, generate, request_of, result_of

TEXT = {"type": "string"}
PAIR = {"type": "object", "properties": {"prompt": TEXT, "completion": TEXT}, "required": ["prompt", "completion"]}
GOOD = '{"open": "the door"}'
LAMP_SCHEMA = {"type": "object", "required": ["open"], "properties": {"open": TEXT}}


def taken(answers: list[str], check: RowCheck | None = None, recipe: str = "commands") -> tuple[list[Row], Intake]:
    """Return what becomes of a model's answers to different prompts."""
    rows: list[Row] = []
    settings = LlmSettings(with_schema(RECIPES[recipe], PAIR), 100)
    intake = Intake(settings, "asked", rows.append, check=check)
    items = [{"prompt": f"prompt {number}", "completion": answer} for number, answer in enumerate(answers)]
    content = json.dumps({"items": items})
    intake.take(CallRecord(0, len(items), "", "answered", content, "stop", "toy"))
    return rows, intake


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("Certainly! " + GOOD, "rejected_not_json"), (GOOD + GOOD, "rejected_not_json"), ("[1]", "rejected_not_json"),
        ("{}", "rejected_schema_mismatch"), ('{"open": " "}', "rejected_empty_field"),
        ('{"open": "the d\ufffdor"}', "rejected_broken_text"), ("\u200b \n", "rejected_empty_content"),
    ],
)  # fmt: skip
def test_a_row_that_the_default_gate_would_refuse_is_turned_down_by_its_rule(answer: str, outcome: str) -> None:
    rows, intake = taken([GOOD, answer])
    assert [row.messages[1]["content"] for row in rows] == [GOOD]
    assert intake.outcomes == {outcome: 1}


def test_what_a_safe_fix_mends_is_mended_and_counted() -> None:
    rows, intake = taken([f"```json\n{GOOD}\n```", '{"open": "cafe\u0301"}\r\n', GOOD])
    assert [row.messages[1]["content"] for row in rows] == [GOOD, '{"open": "caf\u00e9"}', GOOD]
    assert intake.outcomes == {"mended": 2}


@pytest.mark.parametrize(
    ("settings", "answer", "outcome"),
    [
        (CheckSettings(max_response_characters=9), "longer than nine", "rejected_answer_too_long"),
        (CheckSettings(language="ko"), "an English answer", "rejected_wrong_language"),
        (CheckSettings(forbid=frozenset({"digits"})), "room 7", "rejected_forbidden_digits"),
        (CheckSettings(forbid=frozenset({"markdown"})), "**bold**", "rejected_forbidden_markdown"),
        (CheckSettings(answer_format="newline"), GOOD, "rejected_wrong_format"),
        (CheckSettings(answer_format="json", answer_schema=LAMP_SCHEMA), "{}", "rejected_schema_mismatch"),
    ],
)
def test_the_gates_own_settings_count(settings: CheckSettings, answer: str, outcome: str) -> None:
    rows, intake = taken([answer], RowCheck(settings), recipe="instruction-response")
    assert not rows and intake.outcomes == {outcome: 1}


def test_what_the_gate_allows_comes_in_and_what_it_refuses_does_not() -> None:
    allowed = Gate(allow=frozenset({"NOT_JSON", "FENCED_JSON"}))
    fenced = f"```json\n{GOOD}\n```"
    rows, intake = taken(["plain", fenced], RowCheck(gate=allowed))
    assert [row.messages[1]["content"] for row in rows] == ["plain", fenced] and not intake.outcomes
    strict = RowCheck(CheckSettings(language="ko"), Gate(refuse=frozenset({"FOREIGN_LETTERS"})))
    rows, intake = taken(["오늘은 바다를 걸어요 API"], strict, recipe="instruction-response")
    assert not rows and intake.outcomes == {"rejected_foreign_letters": 1}


def bad_and_good(numbers: Any) -> Any:
    """Return a provider that mixes good commands with bad ones of several kinds."""
    bad = ["Sure: {}", "{}", '{"open": ""}', '{"open": "\ufffd\ufffd"}', '{"open": "door 7"}', '{"shut": "door"}']

    def reply(_: dict[str, Any]) -> web.Response:
        answers = [*bad, GOOD, f"```json\n{GOOD}\n```"]
        items = [{"prompt": f"prompt {next(numbers)}", "completion": answer} for answer in answers]
        return completion(json.dumps({"items": items}))

    return reply


@pytest.mark.slow
async def test_a_run_with_bad_rows_of_every_kind_ends_with_all_its_rows(
    running: Running, provider: FakeProvider
) -> None:
    provider.default = bad_and_good(itertools.count())
    schema = json_format.ParseDict(PAIR, struct_pb2.Struct())
    request = request_of(recipe="commands", rows=10, batch_size=8, item_schema=schema, max_candidates_ratio=6)
    request.gate.answer_schema.update(LAMP_SCHEMA)
    request.gate.forbid.append(datagen_pb2.FORBIDDEN_TEXT_DIGITS)
    result = result_of(await generate(running, request))
    assert result.train_rows + result.validation_rows == 10
    told = dict(result.rows_by_outcome)
    assert (told["accepted"], told["mended"]) == (10, 5)
    assert told["rejected_schema_mismatch"] >= 8
    for rule in ("not_json", "empty_field", "broken_text", "forbidden_digits"):
        assert told[f"rejected_{rule}"] >= 4
        rejected = told[f"rejected_{rule}"]
        assert await counted(running, "rows_total", rejected, outcome=f"rejected_{rule}") == rejected
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    turned_down = {name: count for name, count in told.items() if name.startswith("rejected_")}
    assert {name: card["rows_by_outcome"][name] for name in turned_down} == turned_down
    assert {name: card["sources"][0]["outcomes"][name] for name in turned_down} == turned_down
    assert not [finding.code for finding in result.findings if finding.severity == datagen_pb2.FINDING_SEVERITY_ERROR]
