"""The ledger of calls: every answer on disk before it is used, so that no call is ever paid for twice.

One JSON object a line, appended and fsynced. A line torn by a crash is cut off when the ledger is opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraline.core.errors import data_loss

Outcome = Literal["answered", "timeout", "set_aside"]


@dataclass(frozen=True)
class CallRecord:
    """One call: its plan number, the items asked for, a digest of what was sent, and what came back."""

    call: int
    size: int
    payload: str
    outcome: Outcome
    content: str = ""
    finish_reason: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    details: dict[str, str] = field(default_factory=dict)


def payload_digest(payload: Mapping[str, Any]) -> str:
    """Return the digest of a request body; equal bodies give equal digests."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Ledger:
    """An append-only file of calls. `path` None keeps it in memory only, for previews."""

    def __init__(self, path: Path | None):
        self.records: list[CallRecord] = []
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records = list(_read(path)) if path.exists() else []
        self._file = path.open("ab")

    def append(self, record: CallRecord) -> None:
        """Write a record; when this returns it survives a power cut."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _read(path: Path) -> Iterator[CallRecord]:
    """Yield the records; cut a torn last line off, and refuse a file that is broken anywhere else."""
    raw = path.read_bytes()
    complete = raw.rfind(b"\n") + 1
    if complete < len(raw):
        with path.open("r+b") as file:
            file.truncate(complete)
            os.fsync(file.fileno())
    for number, line in enumerate(raw[:complete].split(b"\n")[:-1], start=1):
        try:
            yield CallRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise data_loss(
                "LEDGER_DAMAGED", f"The ledger of calls is damaged at {path.name}:{number}. Start the job anew.",
                line=str(number),
            ) from error  # fmt: skip
