"""What recipes promise: lengths, language and marks of a recommendation; kinds and schemas of the caller's."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from google.protobuf import json_format

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import LoralineError
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import CallRecord
from loraline.datagen.llms.prompting import LlmSettings, Prompter
from loraline.datagen.llms.recipes import RECIPES, with_schema
from loraline.datagen.llms.request import llm_of
from loraline.datagen.quality.rows import RowCheck
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.rows import Row

from .quality_data import check, found, row

TEXT = {"type": "string"}


def answer(recommend: str = "Rest.", title: str = "Walk", description: str = "Go outside.") -> str:
    return json.dumps(
        {"recommend": recommend, "challenges": [{"title": title, "description": description}]}, ensure_ascii=False
    )


def taken(
    settings: LlmSettings, items: list[dict[str, Any]], check: RowCheck | None = None
) -> tuple[list[Row], Intake]:
    rows: list[Row] = []
    intake = Intake(settings, "asked", rows.append, check=check)
    content = json.dumps({"items": items})
    intake.take(CallRecord(0, len(items), "", "answered", content, "stop", "toy"))
    return rows, intake


@pytest.mark.parametrize(
    ("text", "settings", "long"),
    [
        (answer(recommend="쉬" * 100), {}, False), (answer(recommend="쉬" * 101), {}, True),
        (answer(title="w" * 101), {}, True), (answer(description="d" * 101), {}, True),
        # Each text has its own room: the JSON as a whole may be longer.
        (answer("r" * 100, "t" * 100, "d" * 100), {}, False),
        # Readers see 100 families; as code points they are 500.
        (answer(recommend="👨‍👩‍👧" * 100), {}, False), (answer(recommend="👨‍👩‍👧" * 101), {}, True),
        (answer(recommend="r" * 61), {"max_response_characters": 60}, True),
        (answer(recommend="r" * 150), {"max_response_characters": 150}, False),
    ],
)  # fmt: skip
def test_each_text_of_a_recommendation_has_100_characters(
    tmp_path: Any, text: str, settings: dict[str, Any], long: bool
) -> None:
    told = found(check(tmp_path, [row("Tired.", text, kind="recommendation")], (), CheckSettings(**settings)))
    assert ("ANSWER_TOO_LONG" in told) is long


@pytest.mark.parametrize(
    ("lines", "long"),
    [
        ("r" * 100 + "\n" + "t" * 60 + ": " + "d" * 90, False), ("r" * 101 + "\nWalk: go", True),
        ("Rest.\nWalk: " + "d" * 101, True), ("Rest.\n" + "t" * 101 + ": go", True),
    ],
)  # fmt: skip
def test_so_has_a_recommendation_in_lines(tmp_path: Any, lines: str, long: bool) -> None:
    told = found(check(tmp_path, [row("Tired.", lines, kind="recommendation", format="newline")]))
    assert ("ANSWER_TOO_LONG" in told) is long


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        (answer("**Rest** now."), "", "FORBIDDEN_MARKDOWN"), (answer("Rest 5 minutes ☕ now."), "", None),
        (answer("쉬세요.", "걷기", "공원을 걸어 보세요."), "ko", None),
        (answer("쉬세요.", "걷기", "10분만 걸어요."), "ko", "FORBIDDEN_DIGITS"),
        (answer("쉬세요 ☕", "걷기", "걸어요."), "ko", "FORBIDDEN_EMOJI"),
        (answer("쉬세요.", "요가 class", "걸어요."), "ko", "FORBIDDEN_LATIN"),
        (answer("休息一下。", "散步", "OK 去公园。"), "zh", "FORBIDDEN_LATIN"),
        (answer("Rest 5 minutes ☕ now."), "en", None), (answer("Rest."), "ko", "WRONG_LANGUAGE"),
    ],
)  # fmt: skip
def test_a_recommendation_is_plain_and_in_one_language(
    tmp_path: Any, text: str, language: Any, code: str | None
) -> None:
    made = row("Tired.", text, kind="recommendation", format="json")
    told = found(check(tmp_path, [made], (), CheckSettings(language=language)))
    named = {name for name in told if name.startswith(("FORBIDDEN", "WRONG"))}
    assert (code in named) if code else not named


def test_names_of_commands_are_no_language(tmp_path: Any) -> None:
    rows = [row("불을 켜 줘", '{"act": "light on please"}', kind="commands", format="json"),
            row("뭐 해?", '{"say": "nothing at all"}', kind="chat", format="json")]  # fmt: skip
    told = found(check(tmp_path, rows, (), CheckSettings(language="ko")))
    assert told["WRONG_LANGUAGE"] == ["train.jsonl:2"]


def test_the_recommendation_recipe_turns_long_and_marked_texts_down_and_says_so_in_its_prompt() -> None:
    settings = LlmSettings(RECIPES["recommendation"], 9, language="ko")
    made = [
        {"request": f"피곤해요 {n}", **json.loads(text)}
        for n, text in enumerate([
            answer("쉬세요.", "걷기", "걸어 보세요."), answer("쉬" * 101, "걷기", "걸어 보세요."),
            answer("Take a rest now please.", "Walk", "Walk a little."), answer("**쉬세요.**", "걷기", "걸어요."),
        ])
    ]  # fmt: skip
    rows, intake = taken(settings, made)
    assert [one.messages[0]["content"] for one in rows] == ["피곤해요 0"]
    assert intake.outcomes == {
        "rejected_answer_too_long": 1, "rejected_wrong_language": 1, "rejected_forbidden_markdown": 1,
    }  # fmt: skip
    asked = Prompter(settings, 1).question(0, 4)
    assert "No text in an answer is longer than 100 characters." in asked
    assert "digits, emoji, Latin letters, markdown" in asked
    wider = Prompter(LlmSettings(RECIPES["recommendation"], 9, longest_text=60), 1).question(0, 4)
    assert "longer than 60 characters" in wider


def test_a_recipe_can_state_kind_and_forbidden_text() -> None:
    request = datagen_pb2.LlmRecipe(
        recipe="instruction-response", rows=3, kind="feedback", forbid=[datagen_pb2.FORBIDDEN_TEXT_DIGITS]
    )
    settings = llm_of(request, "llm")
    items = [{"instruction": f"q{n}", "response": said} for n, said in enumerate(["good", "x" * 101, "7 of 7"])]
    rows, intake = taken(settings, items)
    assert [(one.kind, one.messages[1]["content"]) for one in rows] == [("feedback", "good")]
    assert intake.outcomes == {"rejected_answer_too_long": 1, "rejected_forbidden_digits": 1}


def test_rows_of_an_own_schema_keep_the_format_that_they_were_written_in() -> None:
    pair = {"type": "object", "properties": {"prompt": TEXT, "completion": {}}, "required": ["prompt", "completion"]}
    settings = LlmSettings(with_schema(RECIPES["instruction-response"], pair), 9)
    answers: list[Any] = [{"open": "door"}, "just words", '{"open": "lamp"}']
    rows, _ = taken(settings, [{"prompt": f"p{n}", "completion": said} for n, said in enumerate(answers)])
    assert [one.format for one in rows] == ["json", "text", "json"]
    assert rows[0].messages[1]["content"] == '{"open": "door"}'
    turns = {"type": "object", "properties": {"messages": {"type": "array"}}, "required": ["messages"]}
    talk = [{"role": "user", "content": "open"}, {"role": "assistant", "content": '{"open": "door"}'}]
    (one,), _ = taken(LlmSettings(with_schema(RECIPES["instruction-response"], turns), 9), [{"messages": talk}])
    assert one.format == "json"


def test_a_narrower_schema_of_the_recipes_own_fields() -> None:
    command = {"type": "object", "properties": {"act": {"enum": ["open", "shut"]}}, "required": ["act"]}
    schema = {"type": "object", "properties": {"text": TEXT, "command": command}, "required": ["text", "command"]}
    settings = LlmSettings(with_schema(RECIPES["commands"], schema), 9)
    items = [{"text": "Open up!", "command": {"act": "open"}}, {"text": "Burn!", "command": {"act": "burn"}}]
    rows, intake = taken(settings, items)
    assert [one.messages[1]["content"] for one in rows] == ['{"act": "open"}'] and rows[0].format == "json"
    assert intake.outcomes == {"rejected_schema": 1}
    loose = with_schema(RECIPES["commands"], {"type": "object", "properties": {"text": {}, "command": {}}})
    rows, intake = taken(LlmSettings(loose, 9), [{"text": 7, "command": {"act": "x"}}])
    assert not rows and intake.outcomes == {"rejected_content": 1}
    with pytest.raises(LoralineError) as caught:
        with_schema(RECIPES["commands"], {"type": "object", "properties": {"colour": {}}})
    assert "command, text" in caught.value.message


def test_definitions_of_a_schema_are_found_from_the_top_of_response_format() -> None:
    act = {"type": "object", "properties": {"act": {"$ref": "#/$defs/verb"}}, "required": ["act"]}
    schema = {"type": "object", "properties": {"text": TEXT, "command": act}, "required": ["text", "command"],
              "$defs": {"verb": {"enum": ["open"]}}}  # fmt: skip
    request = datagen_pb2.LlmRecipe(recipe="commands", rows=1)
    json_format.ParseDict(schema, request.item_schema)
    body = json.loads(Prompter(llm_of(request, "llm"), 1).body("m", 0, 1, structured=True))
    sent = body["response_format"]["json_schema"]["schema"]
    assert sent["$defs"] == {"verb": {"enum": ["open"]}}

    validator = jsonschema_rs.Draft202012Validator(sent)
    assert validator.is_valid({"items": [{"text": "x", "command": {"act": "open"}}]})
    assert not validator.is_valid({"items": [{"text": "x", "command": {"act": "shut"}}]})


def test_rows_must_be_said_without_texts() -> None:
    with pytest.raises(LoralineError) as caught:
        llm_of(datagen_pb2.LlmRecipe(recipe="commands"), "llm")
    assert (caught.value.reason, "llm.rows" in caught.value.message) == ("ROWS_MISSING", True)
