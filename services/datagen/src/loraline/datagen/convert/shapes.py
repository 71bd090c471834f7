"""The shapes of records that people bring, and how each becomes a conversation.

A shape is recognised by the names of a record's fields, per record: one file may mix them. The table is ordered;
the first entry that fits wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraline.datagen.rows import RowFormat


@dataclass(slots=True)
class Conversation:
    """A record in one common form.

    `asked` is the record's own question or input, which classification looks at; empty when there is none. `turns`
    are (role, text) and may still lack a first user turn; `title` is the heading the record stood under.
    """

    shape: str
    asked: str
    turns: list[tuple[str, str]]
    title: str = ""
    format: RowFormat = "text"
    notes: list[str] = field(default_factory=list)


class ShapeError(ValueError):
    """A record that cannot be used: what is wrong, and the remedy."""

    def __init__(self, reason: str, what: str, remedy: str):
        super().__init__(what)
        self.reason, self.what, self.remedy = reason, what, remedy


@dataclass(frozen=True)
class PairShape:
    """A shape of one question field and one answer field."""

    name: str
    question: str
    answer: str
    question_optional: bool = False


PAIR_SHAPES: tuple[PairShape, ...] = (
    PairShape("alpaca", "instruction", "output"),
    PairShape("alpaca", "instruction", "response"),
    PairShape("input_output", "input", "output", question_optional=True),
    PairShape("prompt_completion", "prompt", "completion"),
    PairShape("prompt_completion", "prompt", "response"),
    PairShape("question_answer", "question", "answer"),
    PairShape("question_answer", "query", "response"),
    PairShape("question_answer", "query", "answer"),
    PairShape("question_answer", "q", "a"),
    PairShape("question_answer", "问题", "回答"),
    PairShape("question_answer", "问题", "答案"),
    PairShape("question_answer", "问", "答"),
    PairShape("question_answer", "질문", "답변"),
    PairShape("speaker_reply", "speaker_line", "reply"),
    PairShape("speaker_reply", "line", "reply"),
    PairShape("speaker_reply", "user", "assistant"),
    PairShape("speaker_reply", "human", "assistant"),
    PairShape("speaker_reply", "human", "bot"),
    PairShape("key_value", "key", "value"),
    PairShape("two_column", "first_column", "second_column"),
)
CONVERSATION_FIELDS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
SHAPES_IN_WORDS = (
    "messages, ShareGPT conversations, instruction/input/output, input/output, prompt/completion, question/answer, "
    "speaker_line/reply, key/value, or a CSV file of two columns"
)


def _normalised(record: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name).strip().lower(): value for name, value in record.items() if name is not None}


def recognise(record: Mapping[Any, Any]) -> str | PairShape | None:
    """Return the field that holds a conversation, or the pair of fields, or None for an unknown shape."""
    fields = _normalised(record)
    for name in CONVERSATION_FIELDS:
        if isinstance(fields.get(name), list) or (name in fields and len(fields) <= 2):
            return name
    for shape in PAIR_SHAPES:
        if shape.answer in fields and (shape.question in fields or shape.question_optional):
            return shape
    return None


def parse(data: Any, names: frozenset[str] = frozenset()) -> Conversation:
    """Return the record as a conversation; ShapeError tells what is wrong. `names` are the character's, lower-case."""
    if not isinstance(data, Mapping):
        raise ShapeError("SHAPE_UNKNOWN", f"the record is {_kind(data)}, not an object.", f"Bring {SHAPES_IN_WORDS}")
    fields = _normalised(data)
    shape = recognise(fields)
    if shape is None:
        named = ", ".join(sorted(fields)[:8]) or "no fields"
        raise ShapeError("SHAPE_UNKNOWN", f"the record has {named}: no known shape.", f"Bring {SHAPES_IN_WORDS}")
    if isinstance(shape, str):
        return _from_turns(fields[shape], CONVERSATION_FIELDS[shape], names)
    if isinstance(fields.get(shape.question), list) and isinstance(fields[shape.answer], list):
        return _from_turns([*fields[shape.question], *fields[shape.answer]], shape.name, names)
    return _from_pair(fields, shape)


def _from_pair(fields: Mapping[str, Any], shape: PairShape) -> Conversation:
    answer, answer_format = _answer(fields[shape.answer], shape.answer)
    title = _text(fields.get("title"), "title")
    asked = prompt = _text(fields.get(shape.question), shape.question)
    if shape.name == "alpaca":
        extra = _text(fields.get("input"), "input")
        asked = extra or prompt
        prompt = "\n".join(part for part in (prompt, extra) if part)
    turns = [("user", prompt)] if prompt else []
    system = _text(fields.get("system"), "system")
    if system:
        turns.insert(0, ("system", system))
    name = "title_input_output" if title and shape.name == "input_output" else shape.name
    return Conversation(name, asked, [*turns, ("assistant", answer)], title, answer_format)


def _from_turns(turns: Any, shape: str, names: frozenset[str]) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise ShapeError("TURNS_INVALID", "the conversation is no list of turns.", "Bring a list of turns")
    merged: list[tuple[str, str]] = []
    notes: list[str] = []
    for number, turn in enumerate(turns, start=1):
        role, text = _turn(turn, number, names)
        if not text:
            raise ShapeError("CONTENT_EMPTY", f"turn {number} is empty.", "Write it, or remove it")
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n{text}")
            notes.append("turns_joined")
        else:
            merged.append((role, text))
    if any(role == "system" for role, _ in merged[1:]):
        raise ShapeError("TURNS_INVALID", "a system turn stands amid the conversation.", "Put it first, or remove it")
    if merged[-1][0] != "assistant":
        merged.pop()
        notes.append("unanswered_turn_dropped")
    if not any(role == "assistant" for role, _ in merged):
        raise ShapeError("ROW_WITHOUT_ASSISTANT", "the conversation has no answer to learn.", "Add the answer")
    asked = next((text for role, text in merged if role != "system"), "")
    if merged[0][0] == "assistant" or (len(merged) > 1 and merged[0][0] == "system" and merged[1][0] == "assistant"):
        asked = ""
    answers = [text for role, text in merged if role == "assistant"]
    written: RowFormat = "json" if all(is_json_object(text) for text in answers) else "text"
    return Conversation(shape, asked, merged, format=written, notes=notes)


def _turn(turn: Any, number: int, names: frozenset[str]) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ShapeError("TURNS_INVALID", f"turn {number} is {_kind(turn)}, not an object.", "Bring role and content")
    spoken = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = _joined_parts(content, number)
    label = str(spoken).strip().lower()
    role = "assistant" if label in names else ROLES.get(label)
    if role is None:
        raise ShapeError(
            "ROLE_UNKNOWN", f"turn {number} is spoken by {spoken!r}.",
            f"Roles are {', '.join(ROLES)}, or the character's name as `character` or an alias",
        )  # fmt: skip
    return role, _text(content, f"turn {number}")


def _joined_parts(parts: list[Any], number: int) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise ShapeError("CONTENT_NOT_TEXT", f"turn {number} holds more than text.", "Leave only its text parts")
    return "".join(str(text) for text in texts)


def _answer(value: Any, name: str) -> tuple[str, RowFormat]:
    """Return the answer's text and format; objects and lists are written as JSON."""
    if isinstance(value, (dict, list)) and value:
        return _checked(json.dumps(value, ensure_ascii=False), name), "json"
    text = _text(value, name)
    if not text:
        raise ShapeError("CONTENT_EMPTY", f"{name!r} is empty.", "Write the answer, or remove the record")
    return text, "json" if is_json_object(text) else "text"


def is_json_object(text: str) -> bool:
    """Tell whether the text is one JSON object and nothing else."""
    if not (text.startswith("{") and text.endswith("}")):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ShapeError("CONTENT_NOT_TEXT", f"{name!r} is {_kind(value)}, not text.", "Write it as text")
    return _checked(str(value), name).strip().replace("\r\n", "\n").replace("\r", "\n")


def _checked(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShapeError(
            "TEXT_BROKEN", f"{name!r} holds half a surrogate pair at character {error.start + 1}.", "Mend the text"
        ) from error
    return text


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
