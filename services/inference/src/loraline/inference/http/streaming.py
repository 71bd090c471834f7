"""Responses that are sent piece by piece, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

_CLIENT_CLOSED_REQUEST = 499
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events; the source is closed however the response ends, and the engine's slot with it."""

    def __init__(self, first: bytes, source: AsyncGenerator[bytes, None]):
        self._source = source
        super().__init__(_chain(first, source), media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for item in rest:
        yield item


async def until_disconnect(request: Request, work: Any) -> Any:
    """Await the work, or cancel it when the client goes away; a Response with status 499 says so in the log."""
    task, gone = asyncio.ensure_future(_as_coroutine(work)), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _as_coroutine(work: Coroutine[Any, Any, Any]) -> Any:
    return await work


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
