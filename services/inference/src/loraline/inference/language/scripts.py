"""Scripts of letters, emoji and Markdown: what they look like to a check and to a decoder's character class."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

LANGUAGES = {"ko": "Korean", "zh": "Chinese", "en": "English"}
_SCRIPTS = {"ko": ("HANGUL", "HALFWIDTH HANGUL"), "zh": ("CJK", "IDEOGRAPHIC"), "en": ("LATIN",)}
LETTERS = {
    "ko": "가-힣ㄱ-ㆎ",
    "zh": "一-鿿㐀-䶿〇",
    "en": "A-Za-zÀ-ÖØ-öø-ſ",
}
"""Character classes of each language's letters, for decoding; a check takes all of the script's letters."""
EMOJI = "\U0001f300-\U0001faff\U0001f1e6-\U0001f1ff☀-➿⬀-⯿⌚-⏿\ufe0f\u200d\u20e3"
"""Pictures, flags, keycaps, and what joins them."""
_EMOJI = re.compile(f"[{EMOJI}]")
_MARKDOWN = re.compile(
    r"(?m)^ {0,3}(?:#{1,6}\s|>\s|[-*+]\s|\d{1,3}[.)]\s|\|.*\||```|~~~)"
    r"|\*\*[^*\n]+\*\*|__[^_\n]+__|~~[^~\n]+~~|`[^`\n]+`|!?\[[^\]\n]*\]\([^)\n]+\)"
)
# A letter of these scripts says about as much as this many Latin letters.
_WEIGHTS = {"ko": 2, "zh": 3, "en": 1}


@lru_cache(maxsize=8192)
def script_of(character: str) -> str:
    """Return `ko`, `zh`, `en` or `other` for a letter, or nothing for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "")
    return next((language for language, names in _SCRIPTS.items() if name.startswith(names)), "other")


def language_of(text: str) -> str:
    """Return `ko`, `zh` or `en` by most of the letters; nothing for a text of no letters or of another language."""
    counts = Counter(script for character in text if (script := script_of(character)))
    if _kana(text) * 4 > counts["zh"] > 0 or counts["other"] > sum(counts[name] for name in _WEIGHTS):
        return ""
    weighed = {name: counts[name] * weight for name, weight in _WEIGHTS.items() if counts[name]}
    return max(weighed, key=lambda name: weighed[name]) if weighed else ""


def stray_letter(text: str, language: str) -> str:
    """Return the first letter that another script than the language's brought in; nothing when all are its own."""
    return next((found for found in text if script_of(found) not in ("", language)), "")


def first_emoji(text: str) -> str:
    """Return the first emoji; nothing for a text without one."""
    match = None if text.isascii() else _EMOJI.search(text)
    return match.group() if match else ""


def first_markdown(text: str) -> str:
    """Return the first mark-up of Markdown: heading, list, table, bold, code, link; nothing for plain text."""
    match = _MARKDOWN.search(text)
    return match.group().strip() if match else ""


def _kana(text: str) -> int:
    return sum("぀" <= character <= "ヿ" for character in text)
