"""Errors of spacing in Korean answers, by a morphological analyser (kiwipiepy, the extra `korean`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import RowRule, quoted
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows

ALL_UP_TO = 10_000
LONGEST_TEXT = 1000
MISSING_SHARE = 0.25
MISSING_SPACES = 2
NEEDLESS_SHARE = 1 / 3
NEEDLESS_SPACES = 3
_HANGUL_RUN = regex.compile(r"[가-힣][가-힣 ,.!?\n]*[가-힣]")


def _analyser() -> Any:
    """Return kiwipiepy's analyser, or None where it is not installed. Loading takes a second or two."""
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        return None
    return Kiwi(num_workers=1)


def _runs(row: SeenRow) -> list[str]:
    return [] if row.spoken.isascii() else _HANGUL_RUN.findall(row.spoken[:LONGEST_TEXT])


def _spaces(text: str) -> set[int]:
    """Return the places of a text's spaces, each as the count of other characters before it."""
    places: set[int] = set()
    others = 0
    for character in text:
        if character.isspace():
            places.add(others)
        else:
            others += 1
    return places


class SpacingRule(RowRule):
    """Answers that lack spaces between words, or have them within words.

    An answer is told when the analyser would put in two spaces or more, and a quarter or more of those that it
    would have; or when it would leave out three or more, and a third or more of those that are there. It is not
    always right about a single one, and Korean leaves some to the writer, such as those between nouns. Of more than
    10,000 Korean rows, every second is looked at, of 20,000 more every fourth, and so on: the analyser reads about
    five hundred rows a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._analyser: Any = None
        self._missing = False
        self._korean = FirstRows()
        self._looked_at = 0

    def see(self, row: SeenRow) -> None:
        """Check one row's answers, if they hold Hangul and it is their turn."""
        if not _runs(row):
            return
        self._korean.add(row.number)
        step = 1 << (self._korean.count // ALL_UP_TO).bit_length()
        if not self._korean.count % step:
            super().see(row)

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row's answers, if they hold Hangul."""
        runs = _runs(row)
        if not runs or self._missing:
            return
        if self._analyser is None:
            self._analyser = _analyser()
            self._missing = self._analyser is None
        if not self._missing:
            self._looked_at += 1
            yield from self._check(runs)

    def _check(self, runs: list[str]) -> Iterator[tuple[str, str]]:
        missing, needless, wanted, there = 0, 0, 0, 0
        lacking = torn = ""
        for run in runs:
            proposed, anew = self._analyser.space(run), self._analyser.space(run, reset_whitespace=True)
            more, less = proposed.count(" ") - run.count(" "), len(_spaces(run) - _spaces(anew))
            wanted, there = wanted + max(proposed.count(" "), 1), there + max(run.count(" "), 1)
            missing, needless = missing + max(more, 0), needless + less
            lacking = lacking or (f"{quoted(run, 30)}: {quoted(proposed, 40)}" if more > 0 else "")
            torn = torn or (f"{quoted(run, 40)}: {quoted(anew, 30)}" if less else "")
        if missing >= MISSING_SPACES and missing >= MISSING_SHARE * wanted:
            yield "SPACING_ERRORS", f"answers that lack spaces, such as {lacking}."
        elif needless >= NEEDLESS_SPACES and needless >= NEEDLESS_SHARE * there:
            yield "SPACING_ERRORS", f"answers with spaces within words, such as {torn}."

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield the rows with wrong spaces, or that nobody could look."""
        if self._missing:
            told = f"{self._korean.count} rows in Korean were not checked for spacing."
            yield Finding("SPACING_NOT_CHECKED", told, self._korean.count, numbers=self._korean.numbers)
            return
        yield from self._faults.findings(self._looked_at)
