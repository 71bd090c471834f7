"""The five calls about sessions, for gRPC and HTTP alike: protobuf in and out."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.errors import invalid_argument
from loraline.inference.sessions.record import SessionRecord
from loraline.inference.sessions.turns import Sessions, owner_now


class SessionCalls:
    """Each acts for the key of the running call; another key's sessions are NOT_FOUND."""

    def __init__(self, sessions: Sessions):
        self._store = sessions.store
        self._metrics = sessions.metrics

    async def create(self, request: pb.CreateSessionRequest) -> pb.Session:
        """Open a session."""
        ttl = self._ttl(request)
        for name in ("system_prompt", "model", "category"):
            if "\x00" in getattr(request, name):
                message = f"{name} holds a NUL character; sessions keep none."
                raise invalid_argument("SESSION_TEXT_INVALID", message, **{name: message})
        record = await asyncio.to_thread(
            self._store.create, owner_now(), request.model, request.category, request.system_prompt, ttl
        )
        self._metrics.count("created")
        return session_message(record)

    async def get(self, request: pb.GetSessionRequest) -> pb.Session:
        """Return a session with its history."""
        return session_message(await asyncio.to_thread(self._store.get, owner_now(), request.name))

    async def list(self, request: pb.ListSessionsRequest) -> pb.ListSessionsResponse:
        """Return a page of the key's sessions, newest first."""
        token, size = request.page_token, request.page_size or 50
        if token and not (token.isascii() and token.isdigit() and len(token) < 19):
            message = "page_token is not one of this server's; leave it empty for the first page."
            raise invalid_argument("PAGE_TOKEN_INVALID", message, page_token=message)
        found = await asyncio.to_thread(self._store.list, owner_now(), size + 1, int(token) if token else None)
        shown = found[:size]
        more = str(shown[-1].id) if len(found) > size else ""
        return pb.ListSessionsResponse(sessions=[session_message(record) for record in shown], next_page_token=more)

    async def reset(self, request: pb.ResetSessionRequest) -> pb.Session:
        """Clear a session's history."""
        record = await asyncio.to_thread(self._store.reset, owner_now(), request.name)
        self._metrics.count("reset")
        return session_message(record)

    async def delete(self, request: pb.DeleteSessionRequest) -> None:
        """Remove a session."""
        await asyncio.to_thread(self._store.delete, owner_now(), request.name)
        self._metrics.count("deleted")

    def _ttl(self, request: pb.CreateSessionRequest) -> float:
        limits = self._store.limits
        if not request.HasField("ttl"):
            return limits.default_ttl_seconds
        seconds = request.ttl.seconds + request.ttl.nanos / 1e9
        if not 0 < seconds <= limits.max_ttl_seconds:
            message = f"ttl is {seconds:g} s; this server keeps sessions for more than 0 and at most "
            message += f"{limits.max_ttl_seconds:g} s after their last use."
            raise invalid_argument("SESSION_TTL_INVALID", message, ttl=message)
        return seconds


def session_message(record: SessionRecord) -> pb.Session:
    """Describe a session, with its history where the record has one."""
    return pb.Session(
        name=record.name,
        system_prompt=record.system_prompt,
        model=record.model,
        category=record.category,
        messages=[pb.Message(**message) for turn in record.history for message in turn],
        create_time=_time(record.create_time),
        expire_time=_time(record.expire_time),
    )


def _time(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return stamp
