"""Rows that lack what training needs, and texts with white space at their ends."""

from __future__ import annotations

from collections.abc import Iterator

from loraline.datagen.quality.rules.rule import RowRule
from loraline.datagen.quality.seen import SeenRow


class ShapeRule(RowRule):
    """Every row has an answer, and no turn is empty."""

    def see_unreadable(self, number: int) -> None:
        """Count a row without messages that could be read."""
        self._faults.add("ROW_INVALID", number)

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row."""
        if not row.answers:
            yield "ROW_WITHOUT_ASSISTANT", ""
        if not all(message["content"].strip() for message in row.messages):
            yield "EMPTY_CONTENT", ""
        elif any(m["content"] != m["content"].strip() for m in row.messages if m["role"] != "system"):
            yield "UNTRIMMED_CONTENT", ""
