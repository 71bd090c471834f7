"""Clients that cost little: raw HTTP on kept connections, and gRPC without decoding its messages."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from servers import SERVED

PROMPT = "Where do the boats go when the storm comes?"
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_END = b"\r\n0\r\n\r\n"


@dataclass
class Told:
    """One answer as its reader saw it."""

    begun: float = field(default_factory=time.monotonic)
    arrivals: list[float] = field(default_factory=list)
    """When each message came; of HTTP, when each read did."""
    messages: int = 0
    tokens: int = 0
    texts: list[bytes] = field(default_factory=list)
    """Kept only where asked for."""
    ended: float = 0.0

    @property
    def first(self) -> float:
        """Seconds to the first message."""
        return self.arrivals[0] - self.begun


Ask = Callable[[int, int, str], Awaitable[Told]]
"""Asks a model for so many tokens, at so many a second of the mock's (0 of a real engine), and reads to the end."""


class HttpConnection(asyncio.Protocol):
    """One kept connection; reads chunked event streams without taking them apart."""

    def __init__(self) -> None:
        self.told = Told()
        self._tail = b""
        self._done: asyncio.Future[Told] | None = None
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[Told]:
        """Send a request; the future is done when its answer has ended."""
        self.told, self._tail = Told(), b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        told = self.told
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data)
            return
        if events := data.count(b"data: "):
            told.arrivals.append(time.monotonic())
            told.messages += events
        self._tail = (self._tail + data)[-600:]
        if self._tail.endswith(_END):
            told.ended = time.monotonic()
            found = _USAGE.search(self._tail)
            told.tokens = int(found[1]) if found else 0
            if self._done is not None and not self._done.done():
                self._done.set_result(told)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            error = RuntimeError if self._tail else ConnectionResetError
            self._done.set_exception(error("the connection was closed"))

    @property
    def closed(self) -> bool:
        """Whether it can be asked no more."""
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()

    def _fail(self, data: bytes) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(data[:500].decode(errors="replace")))


class HttpClients:
    """Asks /v1/chat/completions over as many connections as there are askers."""

    def __init__(self, address: str, key: str):
        self._address, self._key = address, key
        self._free: list[HttpConnection] = []

    async def __call__(self, tokens: int, rate: int, model: str = "") -> Told:
        """Ask once."""
        while self._free:
            connection = self._free.pop()
            if connection.closed:
                continue
            with suppress(ConnectionResetError):  # servers close connections that were idle, even while they are asked
                return await self._told(connection, tokens, rate, model)
        host, _, port = self._address.rpartition(":")
        _, made = await asyncio.get_running_loop().create_connection(HttpConnection, host, int(port))
        return await self._told(made, tokens, rate, model)

    async def _told(self, connection: HttpConnection, tokens: int, rate: int, model: str) -> Told:
        told = await connection.ask(self._request(tokens, rate, model))
        self._free.append(connection)
        return told

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()

    def _request(self, tokens: int, rate: int, model: str) -> bytes:
        content = {
            "model": model or SERVED,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps({**content, "seed": rate} if rate else content).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._address}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class GrpcClients:
    """Asks Chat over one channel. Messages are not decoded but for the last one, which has the usage."""

    def __init__(self, address: str, key: str, *, texts: bool = False):
        import grpc.aio

        from loraline.api.inference.v1 import inference_pb2

        self._pb = inference_pb2
        self._texts = texts
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._channel = grpc.aio.insecure_channel(address)
        self._chat: Any = self._channel.unary_stream(
            "/loraline.api.inference.v1.InferenceService/Chat",
            request_serializer=inference_pb2.ChatRequest.SerializeToString,
            response_deserializer=None,
        )

    async def __call__(self, tokens: int, rate: int, model: str = "") -> Told:
        """Ask once."""
        pb = self._pb
        request = pb.ChatRequest(
            model=model or SERVED,
            messages=[pb.Message(role="user", content=PROMPT)],
            sampling=pb.SamplingParameters(max_tokens=tokens, temperature=1.0, seed=rate or None),
        )
        told, raw = Told(), b""
        async for raw in self._chat(request, metadata=self._metadata):
            told.arrivals.append(time.monotonic())
            if self._texts:
                told.texts.append(raw)
        told.ended, told.messages = time.monotonic(), len(told.arrivals)
        told.tokens = pb.ChatResponse.FromString(raw).usage.completion_tokens
        return told

    async def close(self) -> None:
        await self._channel.close(None)


async def closed_loop(ask: Ask, askers: int, answers: int, tokens: int, rate: int, model: str = "") -> list[Told]:
    """Let each of the askers ask so many times, one after the other; return all answers."""

    async def one(number: int) -> list[Told]:
        return [await ask(tokens, rate, model) for _ in range(answers)]

    return [told for part in await asyncio.gather(*(one(number) for number in range(askers))) for told in part]


def gaps_of(answers: list[Told]) -> list[float]:
    """Return the times between successive messages of the same answer, in seconds."""
    return [
        later - earlier for told in answers for earlier, later in zip(told.arrivals, told.arrivals[1:], strict=False)
    ]


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of them do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
