"""One thing found in a dataset, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loraline.api.datagen.v1 import datagen_pb2
from loraline.datagen.quality.catalogue import CODES, Code
from loraline.datagen.quality.tally import ROWS_SHOWN

_SEVERITIES = {
    "info": datagen_pb2.FINDING_SEVERITY_INFO,
    "warning": datagen_pb2.FINDING_SEVERITY_WARNING,
    "error": datagen_pb2.FINDING_SEVERITY_ERROR,
}
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass
class Finding:
    """One thing found: its code, the message with figures, and the rows (`train.jsonl:17`).

    `numbers` are the rows as a LineIndex numbers them, until the check turns them into `rows`.
    """

    code: str
    message: str
    row_count: int = 0
    rows: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def meaning(self) -> Code:
        """The catalogue's entry."""
        return CODES[self.code]

    def to_proto(self) -> datagen_pb2.Finding:
        """Return the finding as the contract has it."""
        meaning = self.meaning
        return datagen_pb2.Finding(
            code=self.code, severity=_SEVERITIES[meaning.severity], message=self.message, why=meaning.why,
            remedy=meaning.remedy, row_count=self.row_count, rows=self.rows[:ROWS_SHOWN], fixable=meaning.fixable,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the finding for report.json and the data card."""
        meaning = self.meaning
        return {
            "code": self.code, "severity": meaning.severity, "message": self.message, "why": meaning.why,
            "remedy": meaning.remedy, "row_count": self.row_count, "rows": self.rows[:ROWS_SHOWN],
            "fixable": meaning.fixable,
        }  # fmt: skip


def gravest_first(findings: list[Finding]) -> list[Finding]:
    """Return the findings sorted by severity, then code."""
    return sorted(findings, key=lambda finding: (_ORDER[finding.meaning.severity], finding.code))


def rows_text(count: int) -> str:
    """Return `1 row` or `3 rows`."""
    return "1 row" if count == 1 else f"{count} rows"
