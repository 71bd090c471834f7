"""Rows that stand twice, prompts that stand in both files, and answers that are too few."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loraline.datagen.quality.digests import DigestGroups
from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import SHARES_NEED_ROWS, Rule, of_rows, share_text
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows
from loraline.datagen.rows import row_digest

SMALL_POOL_SHARE = 0.5


class DuplicatesRule(Rule):
    """Exact duplicates, leakage of prompts, and the size of the pool of answers.

    A pool with fewer different answers than half the rows is told; the share is our own choice.
    """

    def __init__(self, folder: Path) -> None:
        self._rows = DigestGroups(folder, "row")
        self._prompts = DigestGroups(folder, "prompt")
        self._answers = DigestGroups(folder, "answer")
        self._duplicates, self._leaking, self._answered = FirstRows(), FirstRows(), 0

    def see(self, row: SeenRow) -> None:
        """Take one row's digests in."""
        self._rows.add(row.digest, row.number)
        self._prompts.add(row.prompt_digest, row.number)
        if row.answer:
            self._answered += 1
            self._answers.add(row_digest([{"content": row.answer}]), row.number)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield duplicates, leakage and a small pool."""
        for rows in self._rows.groups():
            self._duplicates.extend(rows[1:])
        for rows in self._prompts.groups():
            if not index.is_validation(int(rows[0])) and index.is_validation(int(rows[-1])):
                self._leaking.extend(row for row in rows if index.is_validation(int(row)))
        if self._duplicates.count:
            yield of_rows("EXACT_DUPLICATES", self._duplicates, total)
        if self._leaking.count:
            yield of_rows("LEAKAGE", self._leaking, total)
        yield from self._pool(total)

    def _pool(self, total: int) -> Iterator[Finding]:
        repeated = FirstRows()
        for rows in self._answers.groups():
            repeated.extend(np.asarray(rows[1:]))
        if self._answered < SHARES_NEED_ROWS or self._answers.distinct >= SMALL_POOL_SHARE * self._answered:
            return
        told = (
            f"There are {self._answers.distinct} different answers in {self._answered} rows: "
            f"{share_text(repeated.count, total)} repeat one. The first of them are named."
        )
        yield Finding("SMALL_ANSWER_POOL", told, repeated.count, numbers=repeated.numbers)

    def figures(self) -> dict[str, Any]:
        """Return how many rows repeat others."""
        counts = {"exact duplicates": self._duplicates.count, "leaking": self._leaking.count}
        return {"duplicates": counts, "distinct_answers": self._answers.distinct}
