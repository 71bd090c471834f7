"""What a kept conversation is, and the bounds it is kept within."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class SessionLimits:
    """Bounds of one server."""

    default_ttl_seconds: float
    """How long a session is kept after its last use when its maker says nothing."""
    max_ttl_seconds: float
    max_per_key: int
    """Sessions that one API key may have open."""
    max_turns: int
    max_bytes: int
    """Bytes of UTF-8 that a session's history may have before another turn is refused."""
    lease_seconds: float = 60.0
    """How long a turn's claim outlives a server that died in the middle of it."""


@dataclass(frozen=True)
class SessionRecord:
    """A session as the database has it. Times are seconds since the epoch."""

    id: int
    name: str
    owner: str
    """Id of the API key that it belongs to; empty where authentication is off."""
    model: str
    category: str
    system_prompt: str
    ttl_seconds: float
    turns: int
    size_bytes: int
    create_time: float
    expire_time: float
    history: tuple[tuple[Message, ...], ...] = ()
    """Turns, oldest first; each holds what the user sent and the answer."""


def size_of(messages: tuple[Message, ...] | list[Message]) -> int:
    """Return the bytes that messages count for."""
    return sum(len(message["content"].encode()) for message in messages)
