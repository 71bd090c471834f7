"""A row as the rules see it: parsed once, with what several rules ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraline.datagen.quality.scripts import language_of, letters_by_script
from loraline.datagen.rows import prompt_digest, row_digest

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
FILES = (TRAIN, VALIDATION)
ROLES = frozenset({"system", "user", "assistant"})


class LineIndex:
    """Numbers lines through both files, so that a row is one integer, and turns such numbers back into places."""

    def __init__(self) -> None:
        self._train_lines = 0

    def number(self, file: str, line: int) -> int:
        """Return the number of a line; train.jsonl must have been numbered before validation.jsonl."""
        if file == TRAIN:
            self._train_lines = max(self._train_lines, line)
            return line
        return self._train_lines + line

    def is_validation(self, number: int) -> bool:
        """Whether the row stands in validation.jsonl."""
        return number > self._train_lines

    def place(self, number: int) -> str:
        """Return `train.jsonl:17`."""
        if self.is_validation(number):
            return f"{VALIDATION}:{number - self._train_lines}"
        return f"{TRAIN}:{number}"


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each row with its line number, one at a time; a line that is no JSON comes as None."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def messages_of(row: Any) -> list[Mapping[str, Any]] | None:
    """Return the row's messages, or None when it has none that can be read."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        return None
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return None
        if not isinstance(message.get("content"), str):
            return None
    return messages


@dataclass
class SeenRow:
    """One row whose messages can be read. `number` is its LineIndex number."""

    file: str
    number: int
    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """What the row is, as it says itself; empty when it does not."""
        return _text(self.row.get("kind"))

    @property
    def format(self) -> str:
        """How the row says that its answer is written; empty when it does not."""
        return _text(self.row.get("format"))

    @cached_property
    def system(self) -> str:
        """The system prompt, or nothing."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else ""

    @cached_property
    def prompt(self) -> str:
        """The first user turn, or nothing."""
        return next((message["content"] for message in self.messages if message["role"] == "user"), "")

    @cached_property
    def answers(self) -> list[str]:
        """The assistant's turns."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]

    @cached_property
    def answer(self) -> str:
        """The last of them, without white space at its ends."""
        return self.answers[-1].strip() if self.answers else ""

    @cached_property
    def json_object(self) -> dict[str, Any] | None:
        """The last answer as a JSON object, if it is one object and nothing else."""
        return json_object(self.answer)

    @cached_property
    def spoken(self) -> str:
        """The words of all answers: of those that are JSON, the text values only, without names and marks."""
        return "\n".join(spoken_words(answer) for answer in self.answers)

    @cached_property
    def language(self) -> str:
        """What most letters of the answers are, as `language_of` names it."""
        return language_of(letters_by_script(self.spoken))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes of the whole row."""
        return row_digest(self.messages)

    @cached_property
    def prompt_digest(self) -> bytes:
        """16 bytes of what is said before the first answer; width, case and white space aside."""
        return prompt_digest(self.messages)


def json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that the text is, or None when it is anything else or anything more."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def spoken_words(answer: str) -> str:
    """Return an answer's words: the text values of a JSON object, one a line, or the text as it is."""
    value = json_object(answer.strip())
    return answer.strip() if value is None else "\n".join(text for _, text in texts_in(value) if text.strip())


def texts_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a JSON value with its path, such as `challenges[0].title`."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from texts_in(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from texts_in(part, f"{path}[{at}]")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
