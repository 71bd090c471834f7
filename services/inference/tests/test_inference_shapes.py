"""Shapes and language rules without an engine: what is refused before, what decoding is told, what is checked after."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loraline.core.errors import LoralineError
from loraline.inference.engines.port import Constraint
from loraline.inference.language.rules import LanguageRule, rule_of
from loraline.inference.language.scripts import language_of
from loraline.inference.notices import Circumstances, notices_of
from loraline.inference.structured.shape import json_grammar, shape_of
from loraline.inference.structured.verdict import failure

pytest.importorskip("xgrammar")
STRICT = ("digits", "emoji", "latin", "markdown", "symbols")


def accepts(constraint: Constraint, text: str) -> bool:
    """Tell whether decoding could write the text."""
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    if constraint.kind == "regex":
        grammar = xgrammar.Grammar.from_regex(constraint.value)
    elif constraint.kind == "grammar":
        grammar = xgrammar.Grammar.from_ebnf(constraint.value)
    else:
        schema = json.dumps(constraint.value)
        grammar = xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=(",", ":"))
    return _is_grammar_accept_string(grammar, text)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("regex", "(("), "not closed"),
        (Constraint("regex", ""), "empty"),
        (Constraint("regex", "(?=a)b"), "Lookahead"),
        (Constraint("grammar", "root ::= nothing"), "not defined"),
        (Constraint("grammar", " "), "empty"),
        (Constraint("choices", ["yes", ""]), "empty"),
        (Constraint("choices", []), "at least one"),
        (Constraint("json_schema", {"type": "strin"}), "at type"),
        (Constraint("json_schema", {"properties": {"a": {"minLength": -1}}}), "properties/a/minLength"),
        (Constraint("json_schema", {"$ref": "http://127.0.0.1:9/x"}), "cannot fetch"),
        (Constraint("json_schema", {"type": "array", "minItems": 3, "maxItems": 1}), "minItems"),
        (Constraint("json_schema", {"properties": {"a": {"allOf": [{}, {}]}}}), "/properties/a: allOf"),
        (Constraint("json_schema", {"properties": {}, "patternProperties": {"a": {}}}), "patternProperties"),
        (Constraint("json_schema", nested(60)), "48 levels"),
    ],
)
def test_what_is_no_shape_is_refused_with_field_and_reason(constraint: Constraint, words: str) -> None:
    with pytest.raises(LoralineError) as caught:
        shape_of(constraint, None)
    assert caught.value.reason == "STRUCTURE_INVALID"
    assert list(caught.value.fields) == [f"structured.{constraint.kind}"]
    assert words in caught.value.message


def test_bounded_texts_take_no_control_characters_and_no_half_ones() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}}, "required": ["a"]}
    shape = shape_of(Constraint("json_schema", schema), None)
    assert shape is not None and shape.decoding is not None
    decided = [accepts(shape.decoding, f'{{"a":"{text}"}}') for text in ("", "a가😀b", "a\tb", "a\x1fb", "abcde")]
    assert decided == [True, True, False, False, False]
    assert not accepts(shape.decoding, '{ "a": "b" }')
    assert not accepts(shape.decoding, '{"a":\n\n"b"}')


def test_what_decoding_cannot_see_is_checked_after() -> None:
    schema = {"type": "array", "items": {"type": "integer", "multipleOf": 5}, "uniqueItems": True}
    shape = shape_of(Constraint("json_schema", schema), None)
    assert shape is not None and shape.decoding is not None
    assert shape.decoding.value == {"type": "array", "items": {"type": "integer"}}
    assert shape.problem("[5, 10]") is None
    for text, words in (("[5, 5]", "non-unique"), ("[3]", "multiple"), ("[5", "no JSON"), ('["a"]', "at 0")):
        problem = shape.problem(text)
        assert problem is not None and problem[0] == "STRUCTURED_ANSWER_INVALID"
        assert words in problem[1], (text, problem)


def test_a_regular_expression_is_matched_as_a_whole_and_in_linear_time() -> None:
    shape = shape_of(Constraint("regex", "(a+)+b|yes"), None)
    assert shape is not None
    assert [shape.problem(text) is None for text in ("aab", "yes", "yes!", "a" * 100_000)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (
            LanguageRule("ko", STRICT),
            ["물을 마시자!", "좋아요. 같이 걷자"],
            ["water", "물 3", "물😀", "**물**", "물%", "你"],
        ),
        (LanguageRule("zh", ("emoji",)), ["你好，世界。3"], ["hello", "你😀", "물"]),
        (LanguageRule("en"), ["Hi there, 3 boats - ok", "Café"], ["물", "Привет"]),
        (LanguageRule("", ("digits",)), ["abc 가"], ["a1"]),
    ],
)
def test_language_rules_hold_while_decoding_and_after(rule: LanguageRule, good: list[str], bad: list[str]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    inside = shape_of(Constraint("json_schema", schema), rule)
    free = shape_of(None, rule)
    assert inside and inside.decoding and free and free.decoding
    grammar = Constraint("grammar", json_grammar(rule))
    for text in [*good, *bad]:
        answer = json.dumps({"a": text}, ensure_ascii=False, separators=(",", ":"))
        right = text in good
        assert accepts(inside.decoding, answer) is right, text
        assert accepts(free.decoding, text) is right, text
        assert accepts(grammar, answer) is right, text
        problem = inside.problem(answer)
        assert (problem is None) is right, text
        assert right or (problem and problem[0] == "LANGUAGE_MISMATCH")


def test_no_endless_spaces_within_texts_of_a_language() -> None:
    rule = LanguageRule("ko")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    shape = shape_of(Constraint("json_schema", schema), rule)
    assert shape and shape.decoding
    assert not accepts(shape.decoding, '{"a":"물  물"}')
    free = shape_of(None, rule)
    assert free and free.decoding and not accepts(free.decoding, "물\n\n물")


def test_the_language_of_a_question() -> None:
    spoken = {"오늘 날씨": "ko", "今天天气": "zh", "Hello": "en", "こんにちは世界": "", "12 + 3": "", "Привет": ""}
    assert {text: language_of(text) for text in spoken} == spoken
    assert rule_of("question", (), "오늘 weather 어때요 그래") == LanguageRule("ko")
    assert rule_of("question", (), "123") is None
    for language, forbid, field in (("fr", (), "language"), ("ko", ("kanji",), "forbid"), ("en", ("latin",), "forbid")):
        with pytest.raises(LoralineError) as caught:
            rule_of(language, forbid, "")
        assert (caught.value.reason, list(caught.value.fields)) == ("LANGUAGE_RULE_INVALID", [field])


def test_a_cut_answer_names_the_max_tokens_to_try() -> None:
    shape = shape_of(Constraint("json_object"), None)
    assert shape is not None
    error = failure(shape, '{"a": [1', "length", 8, 16)
    assert error is not None
    assert (error.reason, error.metadata["try_max_tokens"]) == ("STRUCTURED_ANSWER_CUT", "16")
    assert "max_tokens=16" in error.message
    none_left = failure(shape, '{"a": [1', "length", 8, 0)
    assert none_left is not None and "allows no more" in none_left.message
    assert failure(shape, '{"a": [1]}', "length", 8, 16) is None  # complete just at its limit


def test_empty_and_useless_answers_are_explained() -> None:
    def notices(text: str, finish: str, **changed: Any) -> str:
        made = {"prompt_tokens": 30, "max_tokens": 8, "asked_tokens": 8, "ceiling": 100, "window": 200}
        flags = {"plain_prompt": False, "has_template": True, "stop_texts": False, "is_json": False}
        return " ".join(notices_of(Circumstances(**{**made, **flags, **changed}), {0: text}, {0: finish}))

    assert notices("fine", "stop") == ""
    assert "max_tokens=16" in notices("so", "length")
    assert "the most that this server allows" in notices("so", "length", max_tokens=100, asked_tokens=100)
    assert "context window of 200 tokens ends" in notices("so", "length", asked_tokens=50)
    assert "ended it at once" in notices("", "stop")
    assert "stop text" in notices("", "stop", stop_texts=True)
    assert "whitespace or special tokens" in notices(" \n", "length")
    assert "no context" in notices("", "stop", plain_prompt=True, prompt_tokens=2)
    assert "has a chat template" in notices("", "stop", plain_prompt=True)
    assert "no chat template" in notices("", "stop", plain_prompt=True, has_template=False)
    assert "no content" in notices('{"a": "", "b": [" "]}', "stop", is_json=True)
