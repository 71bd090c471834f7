"""What callers of sessions are told."""

from __future__ import annotations

from datetime import timedelta

import grpc

from loraline.core.errors import LoralineError, not_found, resource_exhausted


def unknown_session(name: str) -> LoralineError:
    """NOT_FOUND: there is none of this name, it expired, or it is another key's; which one is nobody's business."""
    message = (
        f"There is no session {name!r} for this key. Sessions end some time after their last use "
        "and belong to the key that opened them. Open one with CreateSession."
    )
    return not_found("SESSION_NOT_FOUND", message, session=name)


def busy(name: str) -> LoralineError:
    """ABORTED: a turn of the session is being answered, and a second one would not know what the first said."""
    message = f"Session {name} is answering a turn. Send the next one when that answer has ended."
    error = LoralineError(grpc.StatusCode.ABORTED, "SESSION_BUSY", message, metadata={"session": name})
    error.retry_after = timedelta(seconds=1)
    return error


def changed(name: str) -> LoralineError:
    """ABORTED: the session was reset or deleted, or its claim was lost, while a turn was being answered."""
    message = f"Session {name} was reset or deleted while this turn was answered; the turn is not kept. Ask again."
    return LoralineError(grpc.StatusCode.ABORTED, "SESSION_CHANGED", message, metadata={"session": name})


def full(name: str, what: str, limit: int) -> LoralineError:
    """RESOURCE_EXHAUSTED: the history is as long as it may get."""
    message = (
        f"Session {name} has no room for another turn: it may keep {limit} {what}. "
        "Clear it with ResetSession, or open another."
    )
    return resource_exhausted("SESSION_FULL", message, session=name, limit=f"{limit} {what}")


def too_many(limit: int) -> LoralineError:
    """RESOURCE_EXHAUSTED: the key has as many sessions as it may have."""
    message = f"This key has {limit} sessions, as many as one key may have. Delete some with DeleteSession."
    return resource_exhausted("TOO_MANY_SESSIONS", message, limit=str(limit))
