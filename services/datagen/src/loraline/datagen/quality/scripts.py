"""Which writing a text is in, by its letters, and which emoji it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import regex

# Presentation as pictures: single pictographs but for those that are signs in text (such as the trade mark), flags of
# two regional letters, and keycaps; with what joins them into one cluster.
EMOJI = regex.compile(
    r"(?V1)(?:\p{RI}\p{RI}|[0-9#*]\uFE0F?\u20E3"
    r"|[\p{Emoji_Presentation}[\p{Extended_Pictographic}--[©®™‼⁉ℹ〰〽㊗㊙\u2190-\u21FF\u25A0-\u25FF]]]"
    r"[\p{EMod}\uFE0F\u20E3]*(?:\u200D\p{Extended_Pictographic}[\p{EMod}\uFE0F]*)*)"
)
LATIN = regex.compile(r"\p{Latin}+")
DIGITS = regex.compile(r"\p{Nd}+")
_LETTERS: Mapping[str, regex.Pattern[str]] = {
    "han": regex.compile(r"\p{Han}+"),
    "hangul": regex.compile(r"\p{Hangul}+"),
    "latin": LATIN,
    "kana": regex.compile(r"[\p{Hiragana}\p{Katakana}]+"),
    "other": regex.compile(
        r"(?V1)[\p{L}--[\p{Han}\p{Hangul}\p{Latin}\p{Hiragana}\p{Katakana}\p{Common}\p{Inherited}]]"
    ),
}
_NO_LETTERS = {code: None for code in range(128) if not chr(code).isalpha()}
# A letter of these scripts says about as much as this many Latin letters; used to find a text's main language.
_WEIGHTS = {"han": 3, "hangul": 2, "kana": 2, "latin": 1, "other": 1}


def letters_by_script(text: str) -> Counter[str]:
    """Count the letters of a text by script: han, hangul, latin, kana, other."""
    if text.isascii():
        return Counter({"latin": len(text.translate(_NO_LETTERS))})
    return Counter({name: _count(pattern, text) for name, pattern in _LETTERS.items()})


def _count(pattern: regex.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


def language_of(letters: Counter[str]) -> str:
    """Return `ko`, `zh`, `ja`, `latin` or `other` by most of the letters, or `none` for a text without any."""
    weighed = {name: count * _WEIGHTS[name] for name, count in letters.items() if count}
    if not weighed:
        return "none"
    if letters["kana"] and letters["kana"] * 4 > letters["han"]:
        return "ja"
    most = max(weighed, key=lambda name: (weighed[name], name))
    return {"han": "zh", "hangul": "ko", "kana": "ja"}.get(most, most)


def mostly_han(text: str) -> bool:
    """Whether Han characters are at least a third of a text."""
    return not text.isascii() and 3 * _count(_LETTERS["han"], text) >= len(text)


def emoji_in(text: str) -> list[str]:
    """Return a text's emoji in order, each as its reader sees it."""
    return [] if text.isascii() else EMOJI.findall(text)
