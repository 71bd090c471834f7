"""The ledger as a file: one JSON object a line, appended and fsynced. For a service on one machine.

A line torn by a crash is cut off when the ledger is opened again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from loraline.core.errors import resource_exhausted
from loraline.datagen.llms.answer_index import AnswerIndex, Place
from loraline.datagen.llms.ledger import CallRecord, Ledger, Line, record_of

INDEXED_AT_ONCE = 1000


class FileLedger(Ledger):
    """An append-only file. `index` tells other jobs of its answers and this one of theirs; None shares nothing.

    Answers that came before `since` (seconds since the epoch) are not taken from others.
    """

    def __init__(self, path: Path, index: AnswerIndex | None = None, since: float = 0.0):
        super().__init__()
        self._path, self._index, self._since = path, index, since
        self._end = _open_for_append(path)
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._torn = False

    def replay(self) -> Iterator[CallRecord]:
        """Yield what is recorded; answers that the index lost in a power cut are put into it again."""
        lines: list[tuple[CallRecord, int]] = []
        for record, position in self._lines():
            self._note(record)
            lines.append((record, position))
            if len(lines) >= INDEXED_AT_ONCE:
                self._to_index(lines)
                lines = []
            yield record
        self._to_index(lines)

    def _recorded(self) -> Iterator[CallRecord]:
        return (record for record, _ in self._lines())

    def _lines(self) -> Iterator[tuple[CallRecord, int]]:
        with self._path.open("rb") as file:
            position = 0
            for number, line in enumerate(file, start=1):
                yield record_of(line, f"{self._path.name}:{number}"), position
                position += len(line)

    def known(self, plans: Sequence[str], first_call: int) -> Iterator[CallRecord]:
        """Yield what other jobs' ledgers hold, as far as they are still there."""
        if self._index is None:
            return
        for place in self._index.known(plans, first_call, self._since, but_not=self._path):
            record = place.read()
            if record is not None:
                yield record

    def _write(self, lines: Sequence[Line]) -> None:
        places: list[tuple[CallRecord, int]] = []
        end = self._end
        for record, line in lines:
            places.append((record, end))
            end += len(line)
        view = memoryview(b"".join(line for _, line in lines))
        try:
            if self._torn:
                self._cut()
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._torn = True
            with suppress(OSError):  # Then the next record waits for it.
                self._cut()
            raise resource_exhausted(
                "DISK_FULL", f"The ledger of calls cannot be written: {error.strerror or error}. Make room in the "
                "data folder and start the job again.",
            ) from error  # fmt: skip
        self._end = end
        self._to_index(places)

    def _cut(self) -> None:
        """Take a torn line off: none may stand before the next one."""
        os.ftruncate(self._file.fileno(), self._end)
        self._torn = False

    def _to_index(self, lines: Sequence[tuple[CallRecord, int]]) -> None:
        if self._index is not None:
            self._index.add(
                Place(self._path, at, record.plan, record.call, record.answered_at)
                for record, at in lines
                if record.outcome == "answered" and record.plan and not record.paid_by
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._index is not None:
            self._index.close()


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
