"""What a dataset is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loraline.core.errors import invalid_argument

Language = Literal["", "ko", "zh", "en"]
Forbidden = Literal["latin", "digits", "emoji", "markdown"]
SIMILARITY = 0.8
LANGUAGES: Mapping[str, str] = {"ko": "Korean", "zh": "Chinese", "en": "English"}


def check_language(language: str, field: str) -> str:
    """Return the language; INVALID_ARGUMENT when there is no rule for it."""
    if language and language not in LANGUAGES:
        names = ", ".join(LANGUAGES)
        raise invalid_argument(
            "LANGUAGE_UNKNOWN", f"{field} is {language!r}; there are rules for {names}. Give one of them, or leave it "
            "empty.", **{field: f"must be one of {names}"},
        )  # fmt: skip
    return language


@dataclass(frozen=True)
class CheckSettings:
    """The rules' parameters; the meanings are those of QualityGate in the contract.

    `tokenizer` is a tokenizer.json; `max_length` counts its tokens. `similarity` is a Jaccard index of 0 to 1.
    """

    language: Language = ""
    forbid: frozenset[Forbidden] = frozenset()
    answer_format: Literal["", "newline", "json"] = ""
    answer_schema: Mapping[str, Any] | None = None
    max_response_characters: int = 0
    max_length: int = 0
    tokenizer: Path | None = None
    similarity: float = SIMILARITY


@dataclass(frozen=True)
class Promise:
    """What the rows of one kind promise: JSON by a schema, the longest answer in grapheme clusters (0: no bound)."""

    schema: Mapping[str, Any] | None = None
    max_characters: int = 0


_TEXT = {"type": "string"}
# Fields of a recommendation as its readers rely on them; more fields do no harm.
RECOMMENDATION = {
    "type": "object",
    "required": ["recommend", "challenges"],
    "properties": {
        "recommend": _TEXT,
        "challenges": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["title", "description"],
                "properties": {"title": _TEXT, "description": _TEXT},
            },
        },
    },
}
PROMISES: Mapping[str, Promise] = {
    "recommendation": Promise(RECOMMENDATION),
    "commands": Promise({"type": "object", "minProperties": 1}),
    "extraction": Promise({"type": "object", "minProperties": 1}),
    "feedback": Promise(max_characters=100),
}
NO_PROMISE = Promise()
