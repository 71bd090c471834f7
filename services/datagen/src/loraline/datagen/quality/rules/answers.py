"""Answers that are not what their recipe promises: JSON and nothing else, its fields, its length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import regex
from jsonschema import Draft202012Validator

from loraline.datagen.quality.rules.rule import RowRule, quoted
from loraline.datagen.quality.seen import SeenRow, json_object, texts_in
from loraline.datagen.quality.settings import NO_PROMISE, PROMISES, CheckSettings, Promise

FENCED = re.compile(r"\A```[ \t]*[A-Za-z0-9]*[ \t]*\r?\n(?P<body>.*?)\r?\n?[ \t]*```\Z", re.DOTALL)
_GRAPHEME = regex.compile(r"\X")
_COLON = re.compile(r"[:：]\s")


def grapheme_count(text: str) -> int:
    """Return how many characters a reader sees: extended grapheme clusters of Unicode's UAX 29."""
    return len(text) if text.isascii() and "\r" not in text else len(_GRAPHEME.findall(text))


def inside_fence(answer: str) -> str | None:
    """Return the text inside when the whole answer is one code fence around a JSON object; None otherwise."""
    match = FENCED.match(answer)
    if match is None or json_object(match["body"].strip()) is None:
        return None
    return match["body"].strip()


def _counted(answer: str, promise: Promise) -> Iterator[tuple[str, str]]:
    """Yield the texts of an answer that a limit counts, with their paths; empty for the whole answer.

    Of a recommendation in lines that is the first line, and of `title: description` each part.
    """
    answer = answer.strip()
    if not promise.each_text:
        yield "", answer
        return
    value = json_object(answer)
    if value is not None:
        yield from texts_in(value)
        return
    first, *lines = answer.splitlines() or [""]
    yield "line 1", first
    for number, line in enumerate(lines, start=2):
        yield from ((f"line {number}", part.strip()) for part in _COLON.split(line, maxsplit=1))


class AnswersRule(RowRule):
    """Single JSON object, schema, empty fields, length.

    A row promises JSON when the gate wants it, when its `format` is json, or when its kind is that of a recipe with a
    schema.
    """

    def __init__(self, settings: CheckSettings) -> None:
        super().__init__()
        self._settings = settings
        self._validators: dict[str, Draft202012Validator | None] = {}

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row's answers."""
        promise = PROMISES.get(row.kind, NO_PROMISE)
        yield from self._length_of(row, promise)
        if not row.answer:
            return
        fenced = inside_fence(row.answer) if row.answer.startswith("```") else None
        if fenced is not None:
            yield "FENCED_JSON", ""
        value = row.json_object if fenced is None else json_object(fenced)
        if self._promises_json(row):
            if value is None:
                yield "NOT_JSON", f"no JSON object and nothing else, as {quoted(row.answer)}."
            else:
                yield from self._object_of(row, value)
        elif self._settings.answer_format == "newline" and value is not None:
            yield "WRONG_FORMAT", ""

    def _promises_json(self, row: SeenRow) -> bool:
        if self._settings.answer_format:
            return self._settings.answer_format == "json"
        # A row that was written as lines, by a template with a mix of formats, says so and promises no JSON.
        return row.format == "json" or (
            row.format != "newline" and PROMISES.get(row.kind, NO_PROMISE).schema is not None
        )

    def _object_of(self, row: SeenRow, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        validator = self._validator(row.kind)
        error = next(validator.iter_errors(value), None) if validator is not None else None
        if error is not None:
            place = error.json_path.removeprefix("$.").removeprefix("$") or "the object"
            yield "SCHEMA_MISMATCH", f"such as {place}: {error.message[:160]}."
        empty = next((path for path, text in texts_in(value) if not text.strip()), None)
        if empty is not None:
            yield "EMPTY_FIELD", f"a field says nothing, such as {empty}."

    def _validator(self, kind: str) -> Draft202012Validator | None:
        if kind not in self._validators:
            schema = self._settings.answer_schema or PROMISES.get(kind, NO_PROMISE).schema
            self._validators[kind] = Draft202012Validator(schema) if schema is not None else None
        return self._validators[kind]

    def _length_of(self, row: SeenRow, promise: Promise) -> Iterator[tuple[str, str]]:
        longest = self._settings.max_response_characters or promise.max_characters
        if not longest:
            return
        counted = (found for answer in row.answers for found in _counted(answer, promise))
        texts = [(path, text) for path, text in counted if len(text) > longest]
        length, path, text = max(((grapheme_count(text), path, text) for path, text in texts), default=(0, "", ""))
        if length > longest:
            what = f"the text {path}" if path else "an answer"
            told = f"{what} is longer than {longest} characters, such as {quoted(text, 40)} of {length}."
            yield "ANSWER_TOO_LONG", told
