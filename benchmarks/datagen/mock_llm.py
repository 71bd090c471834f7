"""A language model that costs nothing: an OpenAI-compatible server that answers after a set time with items it counts.

`python benchmarks/datagen/mock_llm.py --latency 0.05` prints its port and serves until its input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import sys
from collections.abc import Callable

import httptools

WANTED = re.compile(rb"Write (\d+) different item")
HEAD = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s"
Answer = tuple[int, bytes] | tuple[int, bytes, bytes]
"""Status and body; at times whole header lines too, each with its line end."""
Reply = Callable[[bytes], Answer | None]
"""None leaves the request without an answer, its connection open."""


class Model:
    """Answers requests; every item has a number of its own. `damage` may change the text of an answer."""

    def __init__(self, damage: Callable[[int, str], str] = lambda _number, text: text):
        self.requests = 0
        self._numbers = itertools.count()
        self._damage = damage

    def __call__(self, body: bytes) -> Answer:
        self.requests += 1
        found = WANTED.search(body)
        numbers = itertools.islice(self._numbers, int(found[1]) if found else 1)
        items = [{"instruction": f"Question number {number}", "response": f"Answer number {number}"}
                 for number in numbers]  # fmt: skip
        return 200, completion(self._damage(self.requests, json.dumps({"items": items})))


def completion(content: str) -> bytes:
    message = {"role": "assistant", "content": content}
    return json.dumps({
        "id": "c", "object": "chat.completion", "created": 0, "model": "mock",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }).encode()  # fmt: skip


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, reply: Reply, latency: float):
        self._reply, self._latency = reply, latency
        self._transport: asyncio.Transport | None = None
        self._body: list[bytes] = []
        self._url = b""
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body, self._body = b"".join(self._body), []
        if self._url.endswith(b"/models"):
            model = {"id": "mock", "object": "model", "created": 0, "owned_by": "mock"}
            self._send(200, json.dumps({"object": "list", "data": [model]}).encode())
        else:
            asyncio.get_running_loop().call_later(self._latency, self._answer, body)

    def _answer(self, body: bytes) -> None:
        answer = self._reply(body)
        if answer is not None:
            status, content, *headers = answer
            self._send(status, content, *headers)

    def _send(self, status: int, content: bytes, headers: bytes = b"") -> None:
        if self._transport is not None:
            self._transport.write(HEAD % (status, len(content), headers, content))


async def serve(reply: Reply, latency: float) -> tuple[asyncio.Server, int]:
    """Serve on a free port of this machine; return the server and the port."""
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(reply, latency), "127.0.0.1", 0, backlog=2048
    )
    return server, server.sockets[0].getsockname()[1]


async def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--latency", type=float, default=0.05)
    server, port = await serve(Model(), arguments.parse_args().latency)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
