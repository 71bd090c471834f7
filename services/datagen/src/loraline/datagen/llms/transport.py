"""The way of a request to an endpoint and of its answer back, as bytes.

A data run sends one kind of request to one address, thousands of times. The client library spends a millisecond of CPU
on each; this path spends a tenth of that: ready-made head, a C parser, connections that stay open. Where the
environment sets a proxy the client library's own transport is used instead.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools
import httpx2 as httpx
import openai

from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.failures import Overloaded, TimedOut, proxy_of

LARGEST_ANSWER = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Transport(Protocol):
    """Sends the body of a chat request; TimedOut and Overloaded say why there is no reply."""

    async def send(self, body: bytes) -> Reply:
        """Return the reply, whatever its status."""
        ...

    async def close(self) -> None:
        """Close the connections."""


def open_transport(endpoint: Endpoint, timeout_seconds: float) -> Transport:
    """Return the transport for an endpoint."""
    if proxy_of(endpoint.base_url):
        return ClientTransport(endpoint, timeout_seconds)
    return LeanTransport(endpoint, timeout_seconds)


class ClientTransport:
    """The client library's own transport: slower, but it knows proxies."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float):
        self._client, self._timeout = endpoint.client(timeout_seconds), timeout_seconds

    async def send(self, body: bytes) -> Reply:
        """Send; as Transport.send."""
        headers = {"content-type": "application/json"}
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(
                    "/chat/completions", content=body, cast_to=httpx.Response, options={"headers": headers}
                )
        except openai.APIStatusError as error:
            response = error.response
        except (TimeoutError, openai.APITimeoutError) as error:
            raise TimedOut from error
        except openai.APIConnectionError as error:
            raise Overloaded(str(error.__cause__ or error)) from error
        return Reply(response.status_code, dict(response.headers), response.content)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class LeanTransport:
    """HTTP/1.1 with connections that stay open; one request at a time on each."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float):
        parts = urlsplit(endpoint.base_url)
        self._host, self._secure = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        # Certificates as the client library finds them, SSL_CERT_FILE included.
        self._ssl = httpx.create_ssl_context() if self._secure else None
        self._timeout = timeout_seconds
        netloc = parts.netloc.rpartition("@")[2]
        self._head = (
            f"POST {parts.path}/chat/completions{'?' + parts.query if parts.query else ''} HTTP/1.1\r\n"
            f"Host: {netloc}\r\nAuthorization: Bearer {endpoint.api_key}\r\nContent-Type: application/json\r\n"
            "Accept: application/json\r\nAccept-Encoding: identity\r\nUser-Agent: loraline-datagen\r\n"
            "Content-Length: "
        ).encode("latin-1")
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def send(self, body: bytes) -> Reply:
        """Send; as Transport.send."""
        request = b"%s%d\r\n\r\n%s" % (self._head, len(body), body)
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = self._from_idle()
                if connection is not None:
                    try:
                        return await connection.ask(request)
                    except _Stale:  # closed by the server while it was idle; nothing was answered
                        pass
                connection = await self._connect()
                return await connection.ask(request)
        except TimeoutError as error:
            raise TimedOut from error
        except (OSError, httptools.HttpParserError, _Stale) as error:
            raise Overloaded(f"{type(error).__name__.strip('_')}: {error}") from error
        finally:
            if connection is not None:
                self._put_back(connection)

    def _from_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            self._open.discard(connection)
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._ssl, server_hostname=self._host if self._secure else None
        )
        self._open.add(connection)
        return connection

    def _put_back(self, connection: _Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.drop()
            self._open.discard(connection)

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._open:
            connection.drop()
        self._open.clear()
        self._idle.clear()


class _Stale(Exception):
    """The connection was closed before a byte of the answer came."""

    def __str__(self) -> str:
        return "the server closed the connection without an answer"


class _Connection(asyncio.Protocol):
    """One connection. It may be used again after a whole answer that does not say otherwise."""

    def __init__(self) -> None:
        self.usable = False
        self._transport: Any = None
        self._answer: asyncio.Future[Reply] | None = None
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._size = 0
        self._any = self._headed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[Reply]:
        """Send a request; the future gives the reply, or OSError, or _Stale."""
        self.usable = False
        self._begin()
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            self._answer.set_exception(_Stale())
        else:
            self._transport.write(request)
        return self._answer

    def drop(self) -> None:
        """Close it at once."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # What the event loop tells.

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.drop()  # nobody asked for it
            return
        self._any = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._transport = None
        if self._answer is None or self._answer.done():
            return
        told_length = "content-length" in self._headers or "transfer-encoding" in self._headers
        if exc is None and self._headed and not told_length:
            self._finish()  # An answer may end with the connection when it told no length.
        elif not self._any and exc is None:
            self._answer.set_exception(_Stale())
        else:
            self._fail(exc or ConnectionResetError("the server closed the connection in the middle of its answer"))

    # What the parser tells.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._headed = self._parser.get_status_code() >= 200

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._size += len(body)
        if self._size > LARGEST_ANSWER:
            self._fail(OSError("the answer is larger than 64 MiB"))

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:  # 1xx announce the real answer
            self._finish()

    def _finish(self) -> None:
        if self._answer is None or self._answer.done():
            return
        try:
            content = _decoded(b"".join(self._pieces), self._headers.get("content-encoding", ""))
        except (zlib.error, ValueError) as error:
            self._fail(OSError(f"the answer's encoding cannot be read: {error}"))
            return
        self.usable = self._transport is not None and self._parser.should_keep_alive()
        self._answer.set_result(Reply(self._parser.get_status_code(), self._headers, content))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.drop()


def _decoded(content: bytes, encoding: str) -> bytes:
    if encoding in ("", "identity"):
        return content
    if encoding not in ("gzip", "deflate"):
        raise ValueError(encoding)
    reader = zlib.decompressobj(wbits=47)  # gzip or zlib, by its head
    decoded = reader.decompress(content, LARGEST_ANSWER)
    if reader.unconsumed_tail:
        raise ValueError("larger than 64 MiB")
    return decoded
