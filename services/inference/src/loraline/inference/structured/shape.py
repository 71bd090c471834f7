"""The shape of an answer: what decoding is told, and what the whole answer is held to afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jsonschema_rs

from loraline.inference.engines.grammars import why_unusable
from loraline.inference.engines.port import Constraint
from loraline.inference.language.rules import LanguageRule
from loraline.inference.structured.schema import decodable, refused, validator

Problem = tuple[str, str]
"""Reason (STRUCTURED_ANSWER_INVALID or LANGUAGE_MISMATCH) and what is wrong, in words."""
_FIELDS = {"json_object": "structured.json_only"}
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class AnswerShape:
    """Made once for a request; use `shape_of`."""

    asked: Constraint | None
    rule: LanguageRule | None
    decoding: Constraint | None
    """What the engine enforces; None when only the check afterwards can tell."""
    check: Callable[[str], str]
    """Return what is wrong with the form of a whole answer; nothing when it is right."""

    @property
    def name(self) -> str:
        """Kind of shape, for metrics: json_schema, json_object, regex, choices, grammar or language."""
        return self.asked.kind if self.asked is not None else "language"

    @property
    def language(self) -> str:
        """The language that the answer is held to; empty for none."""
        return self.rule.language if self.rule is not None else ""

    def problem(self, text: str) -> Problem | None:
        """Return what is wrong with a whole answer; None when it is what was asked."""
        if wrong := self.check(text):
            return "STRUCTURED_ANSWER_INVALID", wrong
        if self.rule is not None:
            for spoken in self._spoken(text):
                if wrong := self.rule.problem(spoken):
                    return "LANGUAGE_MISMATCH", wrong
        return None

    def _spoken(self, text: str) -> Iterator[str]:
        if self.asked is not None and self.asked.is_json:
            yield from texts_of(json.loads(text))
        else:
            yield text


def shape_of(constraint: Constraint | None, rule: LanguageRule | None, field: str = "") -> AnswerShape | None:
    """Return the shape of an answer, or None for free text. INVALID_ARGUMENT STRUCTURE_INVALID names field and reason.

    Blocking, for milliseconds: parses what is asked. Shapes that come again are remembered.
    """
    if constraint is None and rule is None:
        return None
    kind = constraint.kind if constraint is not None else ""
    value = json.dumps(constraint.value) if constraint is not None else ""
    return _shape(kind, value, rule, field or _FIELDS.get(kind, f"structured.{kind}"))


def texts_of(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value; names of fields are not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_of(part)


@lru_cache(maxsize=256)
def _shape(kind: str, value: str, rule: LanguageRule | None, field: str) -> AnswerShape:
    if not kind:
        decoding = Constraint("regex", rule.text_pattern()) if rule is not None else None
        return AnswerShape(None, rule, decoding, lambda text: "")
    asked = Constraint(kind, json.loads(value))  # type: ignore[arg-type]
    # The parser's own words on a regular expression say more than the validator's.
    if kind == "regex" and asked.value and (why := why_unusable(asked)):
        raise refused(field, why)
    check = _CHECKS[kind](asked.value, field)
    decoding = asked
    if kind == "json_schema":
        decoding = Constraint("json_schema", decodable(asked.value, field, rule))
    elif kind == "json_object" and rule is not None:
        decoding = Constraint("grammar", json_grammar(rule))
    if why := why_unusable(decoding):
        raise refused(field, why)
    return AnswerShape(asked, rule, decoding, check)


def json_grammar(rule: LanguageRule) -> str:
    """Return the grammar of any JSON object whose texts keep to a language, without spaces between its parts."""
    word, _ = rule.characters(in_json=True)
    return "\n".join(
        [
            'root ::= "{" (member ("," member)*)? "}"',
            'member ::= "\\"" [a-zA-Z_] [a-zA-Z0-9_]* "\\":" value',
            'value ::= root | array | text | number | "true" | "false" | "null"',
            'array ::= "[" (value ("," value)*)? "]"',
            f'text ::= "\\"" ([{word}] " "?)* "\\""',
            'number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})?',
        ]
    )


def _json_check(schema: Any, field: str) -> Callable[[str], str]:
    if not isinstance(schema, dict):
        raise refused(field, "a schema must be an object")
    known = validator(schema, field)

    def check(text: str) -> str:
        return _json_problem(text, known)

    return check


def _object_check(value: Any, field: str) -> Callable[[str], str]:
    return _json_check({"type": "object"}, field)


def _json_problem(text: str, known: jsonschema_rs.Validator) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    for error in known.iter_errors(value):
        where = "/".join(str(part) for part in error.instance_path)
        return f"at {where or 'its top'}: {error.message[: 3 * _LONGEST_VALUE]}"
    return ""


def _regex_check(pattern: Any, field: str) -> Callable[[str], str]:
    if not isinstance(pattern, str) or not pattern:
        raise refused(field, "the regular expression is empty")
    known = validator({"type": "string", "pattern": f"^(?:{pattern})$"}, field)
    return lambda text: "" if known.is_valid(text) else f"it does not match {pattern[:_LONGEST_VALUE]!r} as a whole"


def _choices_check(choices: Any, field: str) -> Callable[[str], str]:
    if not isinstance(choices, list) or not choices or not all(isinstance(item, str) and item for item in choices):
        raise refused(field, "the choices must be texts, at least one, and none of them empty")
    known = frozenset(choices)
    return lambda text: "" if text in known else f"it is none of the {len(known)} choices"


def _grammar_check(grammar: Any, field: str) -> Callable[[str], str]:
    # Decoding writes nothing else; what a grammar cannot be is an answer that was cut.
    if not isinstance(grammar, str) or not grammar.strip():
        raise refused(field, "the grammar is empty")
    return lambda text: ""


_CHECKS: dict[str, Callable[[Any, str], Callable[[str], str]]] = {
    "json_schema": _json_check,
    "json_object": _object_check,
    "regex": _regex_check,
    "choices": _choices_check,
    "grammar": _grammar_check,
}
