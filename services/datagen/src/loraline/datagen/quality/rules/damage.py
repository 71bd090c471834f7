"""Text that was damaged on its way: wrong decoding, broken-off letters, letters in two encodings."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import regex

from loraline.datagen.quality.rules.rule import RowRule, quoted
from loraline.datagen.quality.seen import SeenRow

# Replacement characters, control characters, half surrogates, private use and non-characters.
_DAMAGED = regex.compile(r"[\uFFFD\p{Cc}\p{Cs}\p{Co}\p{Noncharacter_Code_Point}--[\n\t\r]]", regex.V1)
# What UTF-8 looks like when it was read as Windows-1252 or Latin-1 (a lead byte's letter and a continuation byte's
# sign), and two well-known results of GBK and UTF-8 taken for each other.
_MISREAD = regex.compile(
    "[ÃÂÐÑØÙ][\u0080-\u00bf]|â€[\u0080-\u00bf™œ\u009d“”˜¦]|[ìëêíåäæçèé][\u0080-\u00bf‚-›€]{2}|锟斤拷|烫烫烫"
)
# Latin letters that go on right after Hangul; the other way round ("AI가") is how Korean writes particles.
_GLUED = regex.compile(r"\p{Hangul}\p{Latin}{2,}")
# Single letters of Hangul inside a word, but for those that people write on purpose, as laughter and tears.
_STRAY_LETTER = regex.compile(r"[가-힣][ㄱ-ㅎㅏ-ㅣ--[ㅋㅎㅠㅜㅡ]][가-힣]", regex.V1)
_MARKS = regex.compile(r"[\u200B\u2060\uFEFF\u00AD\u202A-\u202E\u2066-\u2069]|\r")


def normalised(text: str) -> str:
    """Return the text in NFC, with line ends as `\\n` and without zero-width marks and marks of direction."""
    if text.isascii() and "\r" not in text:
        return text
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _MARKS.sub("", plain))


class DamageRule(RowRule):
    """Broken characters anywhere in a row, broken tokens in answers, and text that is not normalised."""

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row."""
        if all(message["content"].isascii() and message["content"].isprintable() for message in row.messages):
            return
        for message in row.messages:
            damaged = _DAMAGED.search(message["content"]) or _MISREAD.search(message["content"])
            if damaged is not None:
                yield "BROKEN_TEXT", f"damaged characters, such as {_around(damaged)}."
                break
        text = row.spoken
        broken = _GLUED.search(text) or _STRAY_LETTER.search(text)
        if broken is not None:
            yield "BROKEN_TOKENS", f"broken words, such as {_around(broken)}."
        if any(normalised(message["content"]) != message["content"] for message in row.messages):
            yield "NOT_NORMALISED", ""


def _around(match: regex.Match[str]) -> str:
    text = match.string[max(0, match.start() - 8) : match.end() + 8]
    shown = "".join(char if char.isprintable() else f"U+{ord(char):04X}" for char in text.replace("\n", " "))
    return quoted(shown, 40)
