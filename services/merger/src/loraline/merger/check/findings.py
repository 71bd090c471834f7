"""A finding: one thing wrong with a model folder, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraline.api.merger.v1 import merger_pb2
from loraline.core.errors import LoralineError

Severity = Literal["info", "warning", "error"]
_GRAVITY: dict[str, int] = {"error": 0, "warning": 1, "info": 2}
_PROTO = {
    "info": merger_pb2.MODEL_FINDING_SEVERITY_INFO,
    "warning": merger_pb2.MODEL_FINDING_SEVERITY_WARNING,
    "error": merger_pb2.MODEL_FINDING_SEVERITY_ERROR,
}


@dataclass(frozen=True)
class Finding:
    """`error`: will not load or will crash; `warning`: will give wrong answers somewhere; `info`: worth knowing."""

    code: str
    severity: Severity
    file: str
    message: str
    remedy: str
    repairable: bool = False

    def to_proto(self) -> merger_pb2.ModelFinding:
        """Return the finding as the contract has it."""
        return merger_pb2.ModelFinding(
            code=self.code,
            severity=_PROTO[self.severity],
            file=self.file,
            message=self.message,
            remedy=self.remedy,
            repairable=self.repairable,
        )


def from_error(error: LoralineError, file: str) -> Finding:
    """Turn a refusal into a finding of the same code; of files that are there, the name alone."""
    path = Path(error.metadata.get("file", file))
    name = path.name if path.is_absolute() and path.is_file() else str(error.metadata.get("file", file))
    return Finding(error.reason, "error", name, error.message, "See the message.")


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort errors before warnings before remarks; within each, by file and code."""
    return sorted(findings, key=lambda finding: (_GRAVITY[finding.severity], finding.file, finding.code))


def loadable(findings: Iterable[Finding]) -> bool:
    """Whether a serving library will load the folder, as far as files tell."""
    return not any(finding.severity == "error" for finding in findings)
