"""Running streams of events that a reader may lose and find again: bounded in number, size and time."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import structlog

from loraline.core.errors import LoralineError, not_found
from loraline.core.private_paths import told_to_callers
from loraline.inference.profiles.streaming import Event

_log = structlog.get_logger(__name__)
_MOST_BYTES = 1024 * 1024
"""Bytes of events kept of one stream."""
HEARTBEAT = b": still here\n\n"


@dataclass
class Stream:
    """One answer's events as they were sent, and the task that makes more."""

    name: str
    owner: str
    frames: list[bytes] = field(default_factory=list)
    size: int = 0
    ended: bool = False
    refusal: LoralineError | None = None
    """Set when the answer failed before its first event: then there is nothing to stream."""
    readers: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    task: asyncio.Task[None] | None = None
    leaving: asyncio.TimerHandle | None = None

    async def add(self, name: str, data: Any, *, last: bool = False) -> None:
        """Number an event, keep it and wake the readers."""
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        frame = f"id: {self.name}.{len(self.frames) + 1}\nevent: {name}\ndata: {text}\n\n".encode()
        async with self.changed:
            self.frames.append(frame)
            self.size += len(frame)
            self.ended = last
            self.changed.notify_all()

    async def begun(self, seconds: float) -> bool:
        """Wait until there is an event or the end, at most so long; return whether it came to that."""
        return await self._news(0, seconds)

    async def read(self, after: int, heartbeat_seconds: float) -> AsyncGenerator[bytes, None]:
        """Yield the events after the given number, then those to come; a comment where nothing comes for long."""
        while True:
            if not await self._news(after, heartbeat_seconds):
                yield HEARTBEAT
                continue
            while after < len(self.frames):
                after += 1
                yield self.frames[after - 1]
            if self.ended and after == len(self.frames):
                return

    async def _news(self, after: int, seconds: float) -> bool:
        try:
            async with self.changed, asyncio.timeout(seconds):
                await self.changed.wait_for(lambda: len(self.frames) > after or self.ended)
        except TimeoutError:
            return False
        return True


class Relay:
    """The streams of one server."""

    def __init__(self, most_streams: int, reconnect_seconds: float, heartbeat_seconds: float):
        self._most = most_streams
        self._reconnect = reconnect_seconds
        self._heartbeat = heartbeat_seconds
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        """Return how many streams are kept."""
        return len(self._streams)

    def open(self, owner: str, source: AsyncGenerator[Event, None]) -> Stream:
        """Begin to make events; RESOURCE_EXHAUSTED STREAMS_FULL when every stream that is kept still runs."""
        self._make_room()
        stream = Stream(secrets.token_hex(16), owner)
        self._streams[stream.name] = stream
        stream.task = asyncio.create_task(self._run(stream, source))
        return stream

    def find(self, owner: str, last_event_id: str) -> tuple[Stream, int]:
        """Return a stream and the number of the last event its reader saw.

        NOT_FOUND STREAM_GONE when it is kept no longer, never was, or is another caller's.
        """
        name, _, number = last_event_id.rpartition(".")
        stream = self._streams.get(name)
        known = stream is not None and stream.owner == owner and number.isascii() and number.isdigit()
        if stream is None or not known or int(number) > len(stream.frames):
            message = (
                f"There is no stream of yours with the event {last_event_id[:60]!r}. Streams are kept for "
                f"{self._reconnect:g} s after their reader left or their end; ask again, without Last-Event-ID."
            )
            raise not_found("STREAM_GONE", message)
        return stream, int(number)

    async def read(self, stream: Stream, after: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield a stream's events to one reader. When the last reader leaves, the stream waits for one, then ends."""
        stream.readers += 1
        if stream.leaving is not None:
            stream.leaving.cancel()
        try:
            async with aclosing(stream.read(after, self._heartbeat)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._left(stream)

    def drop(self, stream: Stream) -> None:
        """Forget a stream and end its answer, which frees the engine's slot."""
        self._streams.pop(stream.name, None)
        if stream.task is not None:
            stream.task.cancel()

    async def stop(self) -> None:
        """End all streams."""
        streams = list(self._streams.values())
        for stream in streams:
            if stream.leaving is not None:
                stream.leaving.cancel()
            self.drop(stream)
        await asyncio.gather(*(stream.task for stream in streams if stream.task), return_exceptions=True)
        for stream in streams:
            if not stream.ended:
                await self._fail(stream, _stopping())

    def _left(self, stream: Stream) -> None:
        stream.readers -= 1
        if not stream.readers and stream.name in self._streams:
            loop = asyncio.get_running_loop()
            stream.leaving = loop.call_later(self._reconnect, self.drop, stream)

    def _make_room(self) -> None:
        if len(self._streams) < self._most:
            return
        over = next((stream for stream in self._streams.values() if stream.ended and not stream.readers), None)
        if over is None:
            message = f"{self._most} streams of profiles run already. Try again, or ask for a JSON answer."
            raise LoralineError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAMS_FULL", message, retry_after=timedelta(seconds=1)
            )
        if over.leaving is not None:
            over.leaving.cancel()
        self.drop(over)

    async def _run(self, stream: Stream, source: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(source) as found:
                async for event in found:
                    await stream.add(event.name, event.data, last=event.name == "close")
                    if stream.size > _MOST_BYTES:
                        raise _too_large()
        except LoralineError as error:
            await self._fail(stream, error)
        except Exception as error:
            _log.error("profile_stream_failed", exc_info=error)
            message = "The server failed on this request; its log says why."
            await stream.add("error", {"code": "internal", "message": message}, last=True)

    async def _fail(self, stream: Stream, error: LoralineError) -> None:
        if not stream.frames:
            stream.refusal = error
        await stream.add("error", error_data(error), last=True)


def error_data(error: LoralineError) -> dict[str, Any]:
    """Return the content of an `error` event: code, message, the fields and figures that are known."""
    error = told_to_callers(error)
    data: dict[str, Any] = {"code": error.reason.lower(), "message": error.message}
    if error.fields:
        data["fields"] = error.fields
    return {**data, "metadata": error.metadata} if error.metadata else data


def _too_large() -> LoralineError:
    message = f"The answer's events passed {_MOST_BYTES} bytes. Ask for less at once."
    return LoralineError(grpc.StatusCode.OUT_OF_RANGE, "STREAM_TOO_LARGE", message)


def _stopping() -> LoralineError:
    message = "The server stops. Ask again; another may answer."
    return LoralineError(grpc.StatusCode.UNAVAILABLE, "STREAM_GONE", message, retry_after=timedelta(seconds=1))
