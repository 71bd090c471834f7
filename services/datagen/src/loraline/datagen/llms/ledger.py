"""The ledger of calls: every answer on disk before it is used, so that no call is ever paid for twice.

One JSON object a line, appended and fsynced, several at a time when several answers wait. A line torn by a crash is cut
off when the ledger is opened again. Answers are not kept in memory, only where each stands in the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from loraline.core.errors import data_loss, resource_exhausted

Outcome = Literal["answered", "timeout", "set_aside", "filtered", "budget"]


@dataclass(frozen=True)
class CallRecord:
    """One call: its plan number, the items asked for, a digest of what was sent, and what came back.

    `outcome`: `answered`; `timeout` (asked again, smaller); `set_aside` (timed out for good); `filtered` (the provider
    refuses this content); `budget` (no call: the cost bound was reached here). `cost` is in US dollars.
    """

    call: int
    size: int
    payload: str
    outcome: Outcome
    content: str = ""
    finish_reason: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    endpoint: str = ""


def payload_digest(payload: bytes) -> str:
    """Return the digest of a request body; equal bodies give equal digests."""
    return hashlib.sha256(payload).hexdigest()


class Ledger:
    """An append-only file of calls; `path` None writes nothing, for previews. One run uses it at a time."""

    def __init__(self, path: Path | None):
        self._path = path
        self._file: BinaryIO | None = None
        self._answers: dict[bytes, int] = {}
        self._end = 0
        self._waiting: list[tuple[bytes, bytes | None, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        if path is not None:
            self._end = _open_for_append(path)
            self._file = path.open("ab", buffering=0)

    def replay(self) -> Iterator[CallRecord]:
        """Yield what is recorded, in its order; DATA_LOSS names the line when the file is damaged."""
        if self._path is None:
            return
        with self._path.open("rb") as file:
            position = 0
            for number, line in enumerate(file, start=1):
                record = self._parsed(line, number)
                if record.outcome == "answered":
                    self._answers[bytes.fromhex(record.payload)] = position
                position += len(line)
                yield record

    def _parsed(self, line: bytes, number: int) -> CallRecord:
        try:
            record = CallRecord(**json.loads(line))
            bytes.fromhex(record.payload)
        except (ValueError, TypeError) as error:
            name = self._path.name if self._path else ""
            raise data_loss(
                "LEDGER_DAMAGED", f"The ledger of calls is damaged at {name}:{number}. Start the job anew.",
                line=str(number),
            ) from error  # fmt: skip
        return record

    @property
    def waiting(self) -> int:
        """Records that are not on disk yet, those being written aside."""
        return len(self._waiting)

    def find(self, digest: str) -> CallRecord | None:
        """Return the recorded answer to exactly this request, or None."""
        position = self._answers.get(bytes.fromhex(digest))
        if position is None or self._path is None:
            return None
        with self._path.open("rb") as file:
            file.seek(position)
            return self._parsed(file.readline(), 0)

    async def append(self, record: CallRecord) -> None:
        """Write a record; when this returns it survives a power cut. Callers go on in the order of the file."""
        if self._file is None:
            return
        line = json.dumps(record.__dict__, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        answered = bytes.fromhex(record.payload) if record.outcome == "answered" else None
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((line, answered, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        await written

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _, _ in batch))
            except OSError as error:
                problem = resource_exhausted(
                    "DISK_FULL", f"The ledger of calls cannot be written: {error.strerror or error}. Make room in the "
                    "data folder and start the job again.",
                )  # fmt: skip
                for _, _, written in batch:
                    if not written.done():
                        written.set_exception(problem)
                continue
            for line, answered, written in batch:
                if answered is not None:
                    self._answers[answered] = self._end
                self._end += len(line)
                if not written.done():
                    written.set_result(None)

    def _write(self, lines: bytes) -> None:
        file = self._file
        if file is None:
            return
        view = memoryview(lines)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _open_for_append(path: Path) -> int:
    """Make the file if need be, cut a torn last line off, and return its length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = not path.exists()
    with path.open("a+b") as file:
        length = file.seek(0, os.SEEK_END)
        end = length
        while end > 0:  # back to the last line's end
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < length:
            file.truncate(end)
        os.fsync(file.fileno())
    if made:  # The name must survive a power cut as well as the lines.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return end
