"""What a dataset is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from loraline.core.errors import invalid_argument

Language = Literal["", "ko", "zh", "en"]
Forbidden = Literal["latin", "digits", "emoji", "markdown"]
SIMILARITY = 0.8
LANGUAGES: Mapping[str, str] = {"ko": "Korean", "zh": "Chinese", "en": "English"}


def check_language(language: str, field: str) -> Language:
    """Return the language; INVALID_ARGUMENT when there is no rule for it."""
    if language and language not in LANGUAGES:
        names = ", ".join(LANGUAGES)
        raise invalid_argument(
            "LANGUAGE_UNKNOWN", f"{field} is {language!r}; there are rules for {names}. Give one of them, or leave it "
            "empty.", **{field: f"must be one of {names}"},
        )  # fmt: skip
    return cast(Language, language)


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
    """What the rows of one kind promise.

    JSON by `schema`; the longest answer, or with `each_text` the longest text in an answer, in grapheme clusters (0: no
    bound); what must not stand in answers, in any language and by language. `in_words` is false where the texts of
    the JSON are no language, such as names of commands.
    """

    schema: Mapping[str, Any] | None = None
    max_characters: int = 0
    each_text: bool = False
    forbid: frozenset[Forbidden] = frozenset()
    forbid_in: Mapping[str, frozenset[Forbidden]] = field(default_factory=dict)
    in_words: bool = True

    def forbidden(self, language: str) -> frozenset[Forbidden]:
        """Return what must not stand in answers of the language; empty for no language."""
        return self.forbid | self.forbid_in.get(language, frozenset())


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
FEEDBACK_CHARACTERS = 100
_PURE: frozenset[Forbidden] = frozenset({"latin", "digits", "emoji", "markdown"})
PROMISES: Mapping[str, Promise] = {
    # People read each text of it in a small place, in one language and nothing else.
    "recommendation": Promise(
        RECOMMENDATION, FEEDBACK_CHARACTERS, each_text=True, forbid=frozenset({"markdown"}),
        forbid_in={"ko": _PURE, "zh": _PURE},
    ),
    "commands": Promise({"type": "object", "minProperties": 1}, in_words=False),
    "extraction": Promise({"type": "object", "minProperties": 1}, in_words=False),
    "feedback": Promise(max_characters=FEEDBACK_CHARACTERS),
}  # fmt: skip
NO_PROMISE = Promise()
