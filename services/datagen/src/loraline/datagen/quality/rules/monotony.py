"""Answers that begin, or begin and end, alike."""

from __future__ import annotations

from collections.abc import Iterator

import regex

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import SHARES_NEED_ROWS, Rule, quoted, share_text
from loraline.datagen.quality.scripts import DIGITS, EMOJI
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows, Frequent

OPENING_SHARE = 0.2
TEMPLATE_SHARE = 0.1
OPENING_WORDS, OPENING_HAN = 3, 6
_WORD = regex.compile(r"\p{Han}|[^\s\p{Han}]+")
_HAN = regex.compile(r"\p{Han}")


def frame_of(text: str) -> tuple[str, str]:
    """Return how a text begins and ends: three words each, or six Han characters; empty when it has no more.

    Numbers count as equal and emoji not at all: that is where templates vary.
    """
    words = _words(text[:200])
    length = OPENING_HAN if _HAN.match(text.lstrip("「『“《（(")) else OPENING_WORDS
    if len(words) <= length:
        return "", ""
    return " ".join(words[:length]).casefold(), " ".join(_words(text[-200:])[-length:]).casefold()


def _words(text: str) -> list[str]:
    return _WORD.findall(DIGITS.sub("0", text) if text.isascii() else EMOJI.sub("", DIGITS.sub("0", text)))


class MonotonyRule(Rule):
    """Openings in a fifth of the rows or more, and frames of opening and ending in a tenth.

    The shares are our own choice. Of JSON answers only the texts count, not the names of fields. Equal answers are
    the pool's business and count here once a row as well.
    """

    def __init__(self) -> None:
        self._openings, self._frames = Frequent(), Frequent()

    def see(self, row: SeenRow) -> None:
        """Take the last answer's frame in."""
        text = row.spoken if len(row.answers) == 1 else row.answer
        opening, ending = frame_of(text)
        if opening:
            self._openings.add(opening, row.number)
            self._frames.add(f"{opening} … {ending}", row.number)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield the most frequent opening and frame, if they are too frequent."""
        if total < SHARES_NEED_ROWS:
            return
        for code, values, share, what in (
            ("SAME_OPENING", self._openings, OPENING_SHARE, "begin their answer with"),
            ("SAME_TEMPLATE", self._frames, TEMPLATE_SHARE, "begin and end their answer alike:"),
        ):
            for text, rows in values.top(1):
                if rows.count >= share * total:
                    yield _finding(code, text, rows, total, what)


def _finding(code: str, text: str, rows: FirstRows, total: int, what: str) -> Finding:
    told = f"{share_text(rows.count, total)} {what} {quoted(text)}."
    return Finding(code, told, rows.count, numbers=rows.numbers)
