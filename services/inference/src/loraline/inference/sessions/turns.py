"""The life of a turn: claimed, answered, kept whole or not at all; and the purge of what expired."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from loraline.core.errors import LoralineError, invalid_argument
from loraline.core.serving.auth import current_principal
from loraline.inference.sessions.metrics import SessionMetrics
from loraline.inference.sessions.record import Message, SessionRecord, size_of
from loraline.inference.sessions.store import SessionStore

if TYPE_CHECKING:
    from loraline.inference.generation import Question

_log = structlog.get_logger(__name__)
PURGE_SECONDS = 60.0


def owner_now() -> str:
    """Return whose sessions the running call may see: those of its API key."""
    principal = current_principal()
    return principal.key_id if principal is not None else ""


@dataclass
class Turn:
    """One turn of a session while it is answered."""

    record: SessionRecord
    token: str
    new: list[Message]
    """What the user sent; system messages hold for this answer only and are not among them."""
    store: SessionStore
    metrics: SessionMetrics
    notices: list[str] = field(default_factory=list)
    ended: bool = False

    async def keep(self, answer: str) -> None:
        """Add the turn to the history. An empty answer is not kept: models continue emptiness."""
        self.ended = True
        try:
            await self._keep(answer)
        except Exception:
            self.ended = False  # the claim is given back where that is still possible
            raise

    async def _keep(self, answer: str) -> None:
        if not answer.strip():
            self.notices.append("The answer is empty, so the session does not keep this turn.")
            self.metrics.count("turn_dropped")
            await asyncio.to_thread(self.store.release, self.record.name, self.token)
            return
        # Postgres holds no NUL in a text.
        messages = [*self.new, {"role": "assistant", "content": answer.replace("\x00", "\ufffd")}]
        await asyncio.shield(asyncio.to_thread(self.store.keep, self.record.name, self.token, messages))
        self.metrics.count("turn_kept")


class Sessions:
    """Opens turns, and removes sessions that expired."""

    def __init__(self, store: SessionStore, metrics: SessionMetrics):
        self.store = store
        self.metrics = metrics
        self._purging: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to purge."""
        self._purging = asyncio.create_task(self._purge())

    async def stop(self) -> None:
        """End the purge."""
        if self._purging is not None:
            self._purging.cancel()
            await asyncio.gather(self._purging, return_exceptions=True)

    @asynccontextmanager
    async def turn(self, question: Question) -> AsyncIterator[tuple[Question, Turn | None]]:
        """Give the question its session's system prompt, model and earlier turns, and hold the session meanwhile.

        A turn that was not kept when the block ends leaves the history as it was. Without a session the question
        comes back as it is, and no turn.
        """
        if not question.session:
            yield question, None
            return
        if question.sampling.n > 1:
            message = "A session keeps one answer to a turn, so n must be 1."
            raise invalid_argument("ONE_ANSWER_PER_CHAT", message, sampling__n=message)
        lead, new = _parted(question.messages)
        token = secrets.token_hex(16)
        try:
            record = await self._claim(question.session, token, size_of(new))
        except LoralineError:
            self.metrics.count("turn_refused")
            raise
        turn = Turn(record, token, new, self.store, self.metrics)
        renewing = asyncio.create_task(self._renew(turn))
        try:
            yield _with_history(question, record, lead, new), turn
        finally:
            renewing.cancel()
            if not turn.ended:
                self.metrics.count("turn_dropped")
                await asyncio.shield(self._release(turn))

    async def _claim(self, name: str, token: str, size: int) -> SessionRecord:
        claiming = asyncio.ensure_future(asyncio.to_thread(self.store.claim, owner_now(), name, token, size))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread goes on whatever happens to its caller: what it claims after all is given back.
            with suppress(LoralineError):
                await claiming
                await asyncio.to_thread(self.store.release, name, token)
            raise

    async def _release(self, turn: Turn) -> None:
        try:
            await asyncio.to_thread(self.store.release, turn.record.name, turn.token)
        except Exception as error:
            # The claim ends by itself then.
            _log.warning("session_not_released", session=turn.record.name, error=str(error))

    async def _renew(self, turn: Turn) -> None:
        while True:
            await asyncio.sleep(self.store.limits.lease_seconds / 3)
            try:
                await asyncio.to_thread(self.store.renew, turn.record.name, turn.token)
            except Exception as error:
                _log.warning("session_not_renewed", session=turn.record.name, error=str(error))

    async def _purge(self) -> None:
        while True:
            try:
                gone = await asyncio.to_thread(self.store.purge)
                if gone:
                    self.metrics.count("expired", gone)
                    _log.info("sessions_expired", sessions=gone)
            except Exception as error:
                _log.warning("sessions_not_purged", error=str(error))
            await asyncio.sleep(PURGE_SECONDS)


def _parted(messages: object) -> tuple[list[Message], list[Message]]:
    """Part a turn's messages into its system messages and what is kept of it."""
    given: list[Message] = [dict(message) for message in messages]  # type: ignore[attr-defined]
    new = [message for message in given if message["role"] != "system"]
    if not new:
        message = "A turn of a session needs a message of the user; it has system messages only."
        raise invalid_argument("SESSION_TURN_EMPTY", message, messages=message)
    if any("\x00" in message["content"] for message in new):
        message = "Sessions keep no NUL characters. Take them out of the text."
        raise invalid_argument("SESSION_TEXT_INVALID", message, messages=message)
    return [message for message in given if message["role"] == "system"], new


def _with_history(question: Question, record: SessionRecord, lead: list[Message], new: list[Message]) -> Question:
    systems = [text for text in (record.system_prompt, *(message["content"] for message in lead)) if text]
    # One system message: most templates refuse a second.
    system = [{"role": "system", "content": "\n\n".join(systems)}] if systems else []
    return replace(
        question, model=question.model or record.model, lead=system, earlier=record.history, messages=tuple(new)
    )
