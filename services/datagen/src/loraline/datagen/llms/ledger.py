"""The ledger of calls: every answer is kept before it is used, so that no call is ever paid for twice.

Where it is kept differs (a file, or a table that several machines share); what it promises does not. Records are
written several at a time when several answers wait. Answers are not kept in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc

from loraline.core.errors import LoralineError, data_loss
from loraline.datagen.digest_set import DigestSet

Outcome = Literal["answered", "timeout", "set_aside", "filtered", "refused", "budget", "candidates"]


@dataclass(frozen=True)
class CallRecord:
    """One call: its number, the items asked for, a digest of what was sent, and what came back.

    `outcome`: `answered`; `timeout` (asked again, smaller); `set_aside` (timed out for good); `filtered` (the provider
    refuses this content); `refused` (HTTP 400 for this request while others are answered); `budget` and `candidates`
    (no call: the cost bound, or that of the candidates, was reached here). `cost` is in US dollars. `plan` is the
    digest of what decides a run's requests, `answered_at` seconds since the epoch; `paid_by` names the other job that
    paid for the answer, if one did.
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
    plan: str = ""
    answered_at: float = 0.0
    paid_by: str = ""


Line = tuple[CallRecord, bytes]
"""A record and its JSON, which is one line."""


def payload_digest(payload: bytes) -> str:
    """Return the digest of a request body; equal bodies give equal digests."""
    return hashlib.sha256(payload).hexdigest()


def line_of(record: CallRecord) -> bytes:
    """Return the record as one line of JSON."""
    return json.dumps(record.__dict__, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def record_of(line: bytes, place: str) -> CallRecord:
    """Return the record that a line holds; DATA_LOSS names the place when it is damaged."""
    try:
        record = CallRecord(**json.loads(line))
        bytes.fromhex(record.payload)
    except (ValueError, TypeError) as error:
        raise data_loss(
            "LEDGER_DAMAGED", f"The ledger of calls is damaged at {place}. Start the job anew.", line=place
        ) from error  # fmt: skip
    return record


def _unwritten(error: Exception) -> LoralineError:
    if isinstance(error, LoralineError):
        return error
    cause = getattr(error, "orig", None) or error  # The database's own words: SQLAlchemy's tell the row as well.
    problem = LoralineError(
        grpc.StatusCode.INTERNAL, "LEDGER_NOT_WRITTEN",
        f"The ledger of calls cannot be written: {type(cause).__name__}: {cause}. Mend the cause and start the job "
        "again; answers that are recorded are not paid for twice.",
    )  # fmt: skip
    problem.__cause__ = error
    return problem


class Ledger(ABC):
    """The calls of one source of one job, in their order. One run uses it at a time."""

    def __init__(self) -> None:
        self._answered = DigestSet()
        self._waiting: list[tuple[Line, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def replay(self) -> Iterator[CallRecord]:
        """Yield what is recorded, in its order; DATA_LOSS names the place of a damaged record."""
        for record in self._recorded():
            self._note(record)
            yield record

    def find(self, digest: str) -> CallRecord | None:
        """Return this ledger's answer to exactly this request, or None. A hit reads the ledger through; it is rare."""
        if bytes.fromhex(digest) not in self._answered:
            return None
        return next((one for one in self._recorded() if one.outcome == "answered" and one.payload == digest), None)

    def known(self, plans: Sequence[str], first_call: int) -> Iterator[CallRecord]:
        """Yield answers that other jobs have paid for under one of these plans, by call number, from `first_call` on.

        A number may come more than once.
        """
        del plans, first_call
        return iter(())

    @property
    def waiting(self) -> int:
        """Records that are not written yet, those being written aside."""
        return len(self._waiting)

    async def append(self, record: CallRecord) -> None:
        """Write a record; when this returns it survives a power cut. Callers go on in the order of the ledger.

        LoralineError when it cannot be written.
        """
        written = asyncio.get_running_loop().create_future()
        self._waiting.append(((record, line_of(record)), written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        await written

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            problem: Exception | None = None
            try:
                await asyncio.to_thread(self._write, [line for line, _ in batch])
            except Exception as error:  # Whoever waits must hear of it, whatever it was: else calls go on unrecorded.
                problem = _unwritten(error)
            for (record, _), written in batch:
                if problem is None:
                    self._note(record)
                if written.done():
                    continue
                if problem is None:
                    written.set_result(None)
                else:
                    written.set_exception(problem)

    def _note(self, record: CallRecord) -> None:
        if record.outcome == "answered":
            self._answered.add(bytes.fromhex(record.payload))

    @abstractmethod
    def _recorded(self) -> Iterator[CallRecord]:
        """Yield what is recorded, in its order."""

    @abstractmethod
    def _write(self, lines: Sequence[Line]) -> None:
        """Write records so that they last, in a thread of its own; an error when that cannot be."""

    def close(self) -> None:  # noqa: B027 (most ledgers hold nothing open)
        """Let go of what is open."""


class NoLedger(Ledger):
    """Keeps nothing, for previews."""

    async def append(self, record: CallRecord) -> None:
        """Keep nothing."""

    def _recorded(self) -> Iterator[CallRecord]:
        return iter(())

    def _write(self, lines: Sequence[Line]) -> None:
        del lines
