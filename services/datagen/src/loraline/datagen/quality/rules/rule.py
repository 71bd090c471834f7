"""What every rule is, and how faults of single rows are counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from loraline.datagen.quality.findings import Finding, rows_text
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows

SHARES_NEED_ROWS = 20
"""Shares of fewer rows than this mean nothing, and are not told."""


class Rule:
    """Sees rows one at a time and keeps little: texts of rows are never kept beyond a bounded sample."""

    def see(self, row: SeenRow) -> None:
        """Take one row in."""
        raise NotImplementedError

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield what was found in `total` rows; called once, after the last row."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """Return what the report draws; called after findings()."""
        return {}


class RowRule(Rule):
    """A rule that looks at each row by itself, so that it can also judge rows one by one as they are made."""

    def __init__(self) -> None:
        self._faults = Faults()

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Yield the code of each fault of a row, with an example or nothing."""
        raise NotImplementedError

    def see(self, row: SeenRow) -> None:
        """Count one row's faults."""
        for code, detail in self.faults_of(row):
            self._faults.add(code, row.number, detail)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield each fault."""
        yield from self._faults.findings(total)


class Faults:
    """Faults of single rows by code. The first detail of each code is told as its example."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, FirstRows] = defaultdict(FirstRows)
        self._details: dict[str, str] = {}

    def add(self, code: str, number: int, detail: str = "") -> None:
        """Count one row."""
        self._rows[code].add(number)
        if detail:
            self._details.setdefault(code, detail)

    def rows(self, code: str) -> FirstRows:
        """The rows of one code."""
        return self._rows[code]

    def findings(self, total: int) -> Iterator[Finding]:
        """Yield a finding for every code with rows."""
        for code, rows in self._rows.items():
            if rows.count:
                yield of_rows(code, rows, total, self._details.get(code, ""))


def of_rows(code: str, rows: FirstRows, total: int, detail: str = "") -> Finding:
    """Return the finding of some of `total` rows."""
    finding = Finding(code, "", rows.count, numbers=rows.numbers)
    told = detail or finding.meaning.says
    finding.message = f"{rows_text(rows.count)} of {total}: {told}"
    return finding


def share_text(count: int, total: int) -> str:
    """Return `37 of 40 rows (92 %)`."""
    return f"{count} of {total} rows ({100 * count / total:.0f} %)"


def quoted(text: str, longest: int = 60) -> str:
    """Return a text as one line in quotation marks, cut to `longest` characters."""
    line = " ".join(text.split())
    return f"“{line[:longest]}…”" if len(line) > longest else f"“{line}”"
