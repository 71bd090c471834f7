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


class SpacingRule(RowRule):
    """Answers that lack spaces between words.

    An answer is told when the analyser would put in two spaces or more, and a quarter or more of those that it
    would have: it is not always right about a single one, and Korean leaves some to the writer. Of more than 10,000
    Korean rows, every second is looked at, of 20,000 more every fourth, and so on: the analyser reads about a
    thousand rows a second.
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
        missing = spaces = 0
        example = ""
        for run in runs:
            proposed = self._analyser.space(run)
            more = proposed.count(" ") - run.count(" ")
            spaces += max(proposed.count(" "), 1)
            missing += max(more, 0)
            example = example or (f"{quoted(run, 30)}: {quoted(proposed, 40)}" if more > 0 else "")
        if missing >= MISSING_SPACES and missing >= MISSING_SHARE * spaces:
            yield "SPACING_ERRORS", f"answers that lack spaces, such as {example}."

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield the rows that lack spaces, or that nobody could look."""
        if self._missing:
            told = f"{self._korean.count} rows in Korean were not checked for spacing."
            yield Finding("SPACING_NOT_CHECKED", told, self._korean.count, numbers=self._korean.numbers)
            return
        yield from self._faults.findings(self._looked_at)
