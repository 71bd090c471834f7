"""The gate: which findings refuse publication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from loraline.core.errors import LoralineError, invalid_argument
from loraline.datagen.quality.catalogue import CODES
from loraline.datagen.quality.findings import Finding


@dataclass(frozen=True)
class Gate:
    """Which codes refuse and which never do; empty `refuse` means every finding of severity error."""

    refuse: frozenset[str] = frozenset()
    allow: frozenset[str] = frozenset()
    drop_duplicates: bool = False

    def check_codes(self) -> None:
        """INVALID_ARGUMENT for codes that do not exist, and for allowing what makes a dataset unusable."""
        for field, codes in (("refuse_codes", self.refuse), ("allow_codes", self.allow)):
            unknown = sorted(codes - CODES.keys())
            if unknown:
                raise invalid_argument(
                    "FINDING_UNKNOWN", f"gate.{field} names {', '.join(unknown)}; there are "
                    f"{', '.join(sorted(CODES))}.",
                    **{f"gate__{field}": f"unknown: {', '.join(unknown)}"},
                )  # fmt: skip
        structural = sorted(code for code in self.allow if CODES[code].structural)
        if structural:
            raise invalid_argument(
                "FINDING_CANNOT_BE_ALLOWED",
                f"gate.allow_codes names {', '.join(structural)}: no model can be trained on such a "
                "dataset. Mend the rows.",
                gate__allow_codes=f"cannot be allowed: {', '.join(structural)}",
            )

    def refused(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return the findings that refuse publication."""
        return [finding for finding in findings if self.refuses(finding.code)]

    def refuses(self, code: str) -> bool:
        """Return whether a finding of this code refuses publication."""
        if code in self.allow:
            return False
        if CODES[code].structural:
            return True
        return code in self.refuse if self.refuse else CODES[code].severity == "error"


def refusal(refused: Sequence[Finding], report: str = "") -> LoralineError:
    """Return the error of a dataset that the gate refuses; its reason is the gravest finding's code.

    `report` is the artifact with the rows in question, if one was published.
    """
    first = refused[0]
    told = " ".join(f"{finding.message} {finding.meaning.remedy}" for finding in refused[:5])
    metadata = {"findings": ",".join(finding.code for finding in refused)}
    if first.rows:
        metadata["rows"] = ",".join(first.rows[:10])
    if report:
        metadata["report"] = report
        told += f" The rows are shown in {report}: loraline artifacts pull {report}"
    return LoralineError(
        grpc.StatusCode.FAILED_PRECONDITION, first.code, f"The dataset was not published: {told}", metadata=metadata
    )
