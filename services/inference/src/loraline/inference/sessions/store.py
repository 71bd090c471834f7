"""Sessions in the platform's database, the same on SQLite and Postgres. Every method blocks for milliseconds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from loraline.core.db.database import Database
from loraline.core.db.schema import session_messages, sessions
from loraline.inference.sessions.errors import busy, changed, full, too_many, unknown_session
from loraline.inference.sessions.record import Message, SessionLimits, SessionRecord, size_of

_FIELDS = [field for field in SessionRecord.__dataclass_fields__ if field != "history"]
_NO_CLAIM = {"claim": "", "claim_expires": 0.0}


class SessionStore:
    """One turn of a session runs at a time, over all servers of a database: it holds the session's claim."""

    def __init__(self, database: Database, limits: SessionLimits, clock: Callable[[], float] = time.time):
        self._database = database
        self.limits = limits
        self._clock = clock

    def create(self, owner: str, model: str, category: str, system_prompt: str, ttl_seconds: float) -> SessionRecord:
        """Open a session. RESOURCE_EXHAUSTED TOO_MANY_SESSIONS above the key's bound."""
        now = self._clock()
        values: dict[str, Any] = {
            "name": f"session-{secrets.token_hex(12)}",
            "owner": owner,
            "model": model,
            "category": category,
            "system_prompt": system_prompt,
            "ttl_seconds": ttl_seconds,
            "turns": 0,
            "size_bytes": 0,
            "create_time": now,
            "expire_time": now + ttl_seconds,
        }
        mine = sa.select(sa.func.count()).where(sessions.c.owner == owner, sessions.c.expire_time > now)
        with self._database.begin() as connection:
            if (connection.execute(mine).scalar() or 0) >= self.limits.max_per_key:
                raise too_many(self.limits.max_per_key)
            inserted = connection.execute(sa.insert(sessions).values(**values, **_NO_CLAIM))
            return SessionRecord(id=int((inserted.inserted_primary_key or (0,))[0]), **values)

    def get(self, owner: str, name: str) -> SessionRecord:
        """Return a session with its history. NOT_FOUND for another key's, too."""
        with self._database.read() as connection:
            return self._read(connection, owner, name)

    def list(self, owner: str, size: int, below: int | None = None) -> list[SessionRecord]:
        """Return at most `size` of a key's sessions, newest first, older than the session with the id `below`."""
        chosen = [sessions.c.owner == owner, sessions.c.expire_time > self._clock()]
        if below is not None:
            chosen.append(sessions.c.id < below)
        query = sa.select(*(sessions.c[field] for field in _FIELDS)).where(*chosen)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(sessions.c.id.desc()).limit(size))
            return [SessionRecord(**row) for row in rows.mappings()]

    def reset(self, owner: str, name: str) -> SessionRecord:
        """Clear a session's history; a turn that is being answered will not be kept."""
        now = self._clock()
        with self._database.begin() as connection:
            found = self._update(connection, self._mine(owner, name, now), turns=0, size_bytes=0, **_NO_CLAIM)
            if not found:
                raise unknown_session(name)
            connection.execute(sa.delete(session_messages).where(session_messages.c.session == name))
            self._touch(connection, name, now)
            return self._read(connection, owner, name)

    def delete(self, owner: str, name: str) -> None:
        """Remove a session; a turn that is being answered will not be kept."""
        with self._database.begin() as connection:
            removed = connection.execute(sa.delete(sessions).where(*self._mine(owner, name, self._clock())))
            if not removed.rowcount:
                raise unknown_session(name)

    def claim(self, owner: str, name: str, token: str, added_bytes: int) -> SessionRecord:
        """Begin a turn and return what was said before.

        NOT_FOUND, ABORTED SESSION_BUSY while another turn runs, RESOURCE_EXHAUSTED SESSION_FULL when there is no room
        for what the turn adds.
        """
        now = self._clock()
        with self._database.begin() as connection:
            free = sa.or_(sessions.c.claim == "", sessions.c.claim_expires < now)
            claim = {"claim": token, "claim_expires": now + self.limits.lease_seconds}
            if not self._update(connection, [*self._mine(owner, name, now), free], **claim):
                self._read(connection, owner, name)
                raise busy(name)
            record = self._read(connection, owner, name)
            if record.turns >= self.limits.max_turns:
                raise full(name, "turns", self.limits.max_turns)
            if record.size_bytes + added_bytes > self.limits.max_bytes:
                raise full(name, "bytes", self.limits.max_bytes)
            return record

    def renew(self, name: str, token: str) -> bool:
        """Go on holding a claim; False when it was lost."""
        with self._database.begin() as connection:
            expires = self._clock() + self.limits.lease_seconds
            return bool(self._update(connection, _held(name, token), claim_expires=expires))

    def keep(self, name: str, token: str, messages: Sequence[Message]) -> None:
        """Add a turn whole, count its session as used and end the claim. ABORTED SESSION_CHANGED when it was lost."""
        now = self._clock()
        with self._database.begin() as connection:
            more = {"turns": sessions.c.turns + 1, "size_bytes": sessions.c.size_bytes + size_of(list(messages))}
            if not self._update(connection, _held(name, token), **more, **_NO_CLAIM):
                raise changed(name)
            turn = connection.execute(sa.select(sessions.c.turns).where(sessions.c.name == name)).scalar_one()
            last = sa.select(sa.func.max(session_messages.c.sequence)).where(session_messages.c.session == name)
            begin = (connection.execute(last).scalar() or 0) + 1
            rows = [
                {"session": name, "sequence": begin + offset, "turn": turn, **message}
                for offset, message in enumerate(messages)
            ]
            connection.execute(sa.insert(session_messages), rows)
            self._touch(connection, name, now)

    def release(self, name: str, token: str) -> None:
        """End a claim without a turn; nothing happens when it is not held."""
        with self._database.begin() as connection:
            self._update(connection, _held(name, token), **_NO_CLAIM)

    def purge(self) -> int:
        """Remove what has expired and is in no turn; return how many sessions went."""
        now = self._clock()
        expired = sa.delete(sessions).where(sessions.c.expire_time <= now, sessions.c.claim_expires <= now)
        with self._database.begin() as connection:
            return connection.execute(expired).rowcount

    def count(self) -> int:
        """Return how many sessions have not expired, of all keys."""
        query = sa.select(sa.func.count()).where(sessions.c.expire_time > self._clock())
        with self._database.read() as connection:
            return connection.execute(query).scalar() or 0

    def _mine(self, owner: str, name: str, now: float) -> list[Any]:
        return [sessions.c.name == name, sessions.c.owner == owner, sessions.c.expire_time > now]

    def _read(self, connection: Connection, owner: str, name: str) -> SessionRecord:
        query = sa.select(*(sessions.c[field] for field in _FIELDS)).where(*self._mine(owner, name, self._clock()))
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise unknown_session(name)
        columns = (session_messages.c.turn, session_messages.c.role, session_messages.c.content)
        said = sa.select(*columns).where(session_messages.c.session == name).order_by(session_messages.c.sequence)
        turns: dict[int, list[Message]] = {}
        for turn, role, content in connection.execute(said):
            turns.setdefault(turn, []).append({"role": role, "content": content})
        return SessionRecord(**row, history=tuple(tuple(messages) for messages in turns.values()))

    @staticmethod
    def _update(connection: Connection, chosen: Sequence[Any], **values: Any) -> int:
        return connection.execute(sa.update(sessions).where(*chosen).values(**values)).rowcount

    @staticmethod
    def _touch(connection: Connection, name: str, now: float) -> None:
        expires = sessions.c.ttl_seconds + now
        connection.execute(sa.update(sessions).where(sessions.c.name == name).values(expire_time=expires))


def _held(name: str, token: str) -> list[Any]:
    return [sessions.c.name == name, sessions.c.claim == token]
