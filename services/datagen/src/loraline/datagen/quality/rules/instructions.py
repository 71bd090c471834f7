"""Prompts that say the same again and again: the reasons for answers beside the question."""

from __future__ import annotations

from collections.abc import Iterator

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import SHARES_NEED_ROWS, Rule, quoted, share_text
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows, Frequent

FIXED_SHARE = 0.5
MISSING_SHARE = 0.2
REPEATED_SYSTEM_SHARE = 0.9
LONGEST_LINE = 200


class InstructionsRule(Rule):
    """One first line, one whole prompt, or one system prompt in a large share of the rows.

    The shares are our own choice: half of the rows for a first line, a fifth for a whole prompt with different
    answers, nine in ten for a system prompt, which is usual for a persona and therefore only told.
    """

    def __init__(self) -> None:
        self._lines, self._prompts, self._systems = Frequent(), Frequent(), Frequent()

    def see(self, row: SeenRow) -> None:
        """Count one row's prompts."""
        if row.system:
            self._systems.add(row.system[:1000], row.number)
        first, _, rest = row.prompt.partition("\n")
        if first and (rest or len(first) <= LONGEST_LINE):
            self._lines.add(first[:1000], row.number)
        if row.prompt and len(row.messages) - bool(row.system) == 2:
            self._prompts.add(row.prompt[:1000], row.number)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield what is repeated too often."""
        if total < SHARES_NEED_ROWS:
            return
        prompt = self._top(self._prompts)
        line = self._top(self._lines)
        if prompt is not None and prompt[1].count / total >= MISSING_SHARE:
            told = f"{share_text(prompt[1].count, total)} ask the same and nothing more: {quoted(prompt[0])}."
            yield Finding("MISSING_INPUT", told, prompt[1].count, numbers=prompt[1].numbers)
        if line is not None and line[1].count / total >= FIXED_SHARE:
            told = f"{share_text(line[1].count, total)} ask with the same first line: {quoted(line[0])}."
            yield Finding("FIXED_INSTRUCTION", told, line[1].count, numbers=line[1].numbers)
        system = self._top(self._systems)
        if system is not None and system[1].count / total >= REPEATED_SYSTEM_SHARE:
            told = f"{share_text(system[1].count, total)} carry the same system prompt: {quoted(system[0])}."
            yield Finding("REPEATED_SYSTEM_PROMPT", told, system[1].count, numbers=system[1].numbers)

    @staticmethod
    def _top(values: Frequent) -> tuple[str, FirstRows] | None:
        top = values.top(1)
        return top[0] if top else None
