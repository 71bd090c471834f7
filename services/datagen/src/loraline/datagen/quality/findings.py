"""The catalogue of findings: what each code means, why it matters and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from loraline.api.datagen.v1 import datagen_pb2

Severity = Literal["info", "warning", "error"]
ROWS_SHOWN = 20
_SEVERITIES = {
    "info": datagen_pb2.FINDING_SEVERITY_INFO,
    "warning": datagen_pb2.FINDING_SEVERITY_WARNING,
    "error": datagen_pb2.FINDING_SEVERITY_ERROR,
}
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Code:
    """A kind of finding. `structural` ones make a dataset unusable: no gate can allow them."""

    severity: Severity
    why: str
    remedy: str
    fixable: bool = False
    structural: bool = False


CODES: dict[str, Code] = {
    "EMPTY_DATASET": Code(
        "error", "A model cannot learn from nothing.",
        "Check the source: its card counts what was left out, and why.", structural=True,
    ),
    "ROW_INVALID": Code(
        "error", "The trainer reads `messages` of role and content; such a row stops it.",
        "Mend the rows, or convert the file anew.", structural=True,
    ),
    "ROW_WITHOUT_ASSISTANT": Code(
        "error", "Only the assistant's turns are learnt; such a row trains nothing and may end at loss 0.0.",
        "Add the answers, or remove the rows.", structural=True,
    ),
    "EMPTY_CONTENT": Code(
        "error", "An empty turn teaches the model to say nothing.",
        "Write the turn, or remove the row; `fix` removes them.", fixable=True, structural=True,
    ),
    "LEAKAGE": Code(
        "error", "Prompts that stand in both files make the validation loss look better than it is.",
        "Make the dataset anew with its split; `fix` removes such rows from validation.jsonl.", fixable=True,
    ),
    "EXACT_DUPLICATES": Code(
        "warning", "A row that stands twice is learnt twice as strongly, and hides how few rows there are.",
        "Set gate.drop_duplicates, or let `fix` remove them.", fixable=True,
    ),
    "FEW_ROWS": Code(
        "info", "Below some 500 rows a model learns the style of the answers, and little else.",
        "Add rows, or weight this dataset among others.",
    ),
    "FIXED_INSTRUCTION": Code(
        "warning",
        "When most prompts begin with the same line, the model learns to answer that line, beside the question.",
        "Vary the instruction, or leave it out and keep the input.",
    ),
    "REPEATED_SYSTEM_PROMPT": Code(
        "info",
        "With one system prompt in every row, the behaviour is bound to it: without it, the model may not show it.",
        "Send the same system prompt when serving, or leave it out of a share of the rows.",
    ),
    "MIXED_FORMATS": Code(
        "info", "With JSON and plain answers mixed, the model chooses by itself unless the prompts say which.",
        "Say the format in the prompt, or keep to one.",
    ),
    "UNTRIMMED_CONTENT": Code(
        "info", "White space at the ends of an answer is learnt like its words.",
        "Let `fix` trim it.", fixable=True,
    ),
    "NO_VALIDATION_ROWS": Code(
        "info", "Without validation rows, over-fitting shows only in use.",
        "Set split.validation_fraction, and bring rows with different prompts.",
    ),
}  # fmt: skip


@dataclass
class Finding:
    """One thing found: its code, the message with figures, and the rows (`train.jsonl:17`)."""

    code: str
    message: str
    row_count: int = 0
    rows: list[str] = field(default_factory=list)

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

    def to_json(self) -> dict[str, object]:
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
