"""Rows that lack what training needs, and texts with white space at their ends."""

from __future__ import annotations

from collections.abc import Iterator

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import Faults, Rule
from loraline.datagen.quality.seen import LineIndex, SeenRow


class ShapeRule(Rule):
    """Every row has an answer, and no turn is empty."""

    def __init__(self) -> None:
        self._faults = Faults()

    def see_unreadable(self, number: int) -> None:
        """Count a row without messages that could be read."""
        self._faults.add("ROW_INVALID", number)

    def see(self, row: SeenRow) -> None:
        """Check one row."""
        if not row.answers:
            self._faults.add("ROW_WITHOUT_ASSISTANT", row.number)
        if not all(message["content"].strip() for message in row.messages):
            self._faults.add("EMPTY_CONTENT", row.number)
        elif any(m["content"] != m["content"].strip() for m in row.messages if m["role"] != "system"):
            self._faults.add("UNTRIMMED_CONTENT", row.number)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield each fault."""
        yield from self._faults.findings(total)
