"""Answers in more than one format."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import SHARES_NEED_ROWS, Rule
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows


class FormatsRule(Rule):
    """JSON and text in one dataset; the rows of the rarer format are named."""

    def __init__(self) -> None:
        self._formats: defaultdict[str, FirstRows] = defaultdict(FirstRows)
        self._kinds: Counter[str] = Counter()

    def see(self, row: SeenRow) -> None:
        """Count one row."""
        text = row.answer.removeprefix("```json").removeprefix("```").lstrip()
        self._formats["json" if text.startswith("{") else "text"].add(row.number)
        self._kinds[row.kind or "not said"] += 1

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield the mix, if it is one."""
        if total < SHARES_NEED_ROWS or len(self._formats) < 2:
            return
        told = ", ".join(f"{rows.count} {name}" for name, rows in sorted(self._formats.items()))
        fewer = min(self._formats.values(), key=lambda rows: rows.count)
        message = f"Answers come in more than one format: {told}. The rows of the rarer one are named."
        yield Finding("MIXED_FORMATS", message, fewer.count, numbers=fewer.numbers)

    def figures(self) -> dict[str, Any]:
        """Return rows by format and by kind."""
        formats = {name: rows.count for name, rows in sorted(self._formats.items())}
        return {"formats": formats, "kinds": dict(self._kinds.most_common(20))}
