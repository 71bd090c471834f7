"""Whether a text is written in the language that was asked for, by its letters; no model, no guessing of dialects."""

from __future__ import annotations

import re

from loraline.core.errors import invalid_argument

NAMES = {"ko": "Korean", "zh": "Chinese", "en": "English"}
SCRIPTS = {
    "ko": re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]"),
    "zh": re.compile(r"[\u3400-\u9fff\U00020000-\U0003134f]"),
    "en": re.compile(r"[A-Za-z]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
}
SHARE = {"ko": 0.6, "zh": 0.6, "en": 0.9}
"""Least share of letters in the language's own script: Korean and Chinese texts name things in Latin letters, too."""


def check_language(language: str, field: str) -> str:
    """Return the language; INVALID_ARGUMENT when there is no rule for it."""
    if language and language not in NAMES:
        raise invalid_argument(
            "LANGUAGE_UNKNOWN", f"{field} is {language!r}; there are rules for {', '.join(NAMES)}. Leave it empty and "
            "say the language in the brief.", **{field: f"must be one of {', '.join(NAMES)}"},
        )  # fmt: skip
    return language


def is_written_in(text: str, language: str) -> bool:
    """Return whether the letters of a text are those of the language; a text without letters is fine."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return True
    joined = "".join(letters)
    counts = {name: len(script.findall(joined)) for name, script in SCRIPTS.items()}
    if language == "zh" and (counts["ko"] or counts["kana"]):
        return False
    if language == "ko" and (counts["kana"] or counts["zh"] > counts["ko"] // 10):
        return False
    return counts[language] >= SHARE[language] * len(letters)
