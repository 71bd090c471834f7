"""A server that plays bytes: what providers send, exactly as they send it, with pauses and broken connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Script = Sequence[bytes | float | str]
"""Bytes to send, seconds to wait, or `close` (orderly), `reset` (abrupt), `half` (closes its sending side only)."""


@dataclass
class RawProvider:
    """Plays one script for each request, the last one for ever; connections stay open unless a script ends them."""

    scripts: list[Script]
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), b":0"
                )
                self.requests.append(head + await reader.readexactly(int(length.split(b":")[1])))
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                if not await self._play(script, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _play(self, script: Script, writer: asyncio.StreamWriter) -> bool:
        for step in script:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif step == "half":
                writer.write_eof()
            else:
                if step == "reset":
                    writer.transport.abort()
                return False
        return True


@asynccontextmanager
async def playing(*scripts: Script) -> AsyncIterator[RawProvider]:
    """Serve the scripts."""
    provider = RawProvider(list(scripts))
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    provider.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield provider
    finally:
        server.close()


def http(status: int, body: bytes, *headers: str) -> bytes:
    """Return a response with its length."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
