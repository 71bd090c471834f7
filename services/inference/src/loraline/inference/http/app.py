"""The ASGI application: /v1/chat/completions, /v1/completions, /v1/models.

API keys are the platform's: its server puts them in front of every stage's HTTP app.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from datetime import datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from loraline.core.errors import LoralineError
from loraline.core.private_paths import told_to_callers
from loraline.inference.generation import Generation
from loraline.inference.host import ModelHost
from loraline.inference.http import errors
from loraline.inference.http.requests import HttpQuestion, chat_question, completion_question, read_body
from loraline.inference.http.responses import DONE, Kind, Shape, event
from loraline.inference.http.sessions import session_routes
from loraline.inference.sessions.calls import SessionCalls

_CLIENT_CLOSED_REQUEST = 499
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def create_app(generation: Generation, sessions: SessionCalls) -> Starlette:
    """Return the application; it needs nothing started, and answers 503 while no model is loaded."""
    routes = _Routes(generation)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            *session_routes(sessions),
        ],
        exception_handlers={
            LoralineError: errors.on_loraline_error,
            HTTPException: errors.on_http_error,
            Exception: errors.on_any_error,
        },
    )


class _Routes:
    def __init__(self, generation: Generation):
        self._generation = generation

    @property
    def _host(self) -> ModelHost:
        return self._generation.host

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await read_body(request)
        return await self._respond(request, "chat", chat_question(body, self._generation.settings.max_tokens))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await read_body(request)
        return await self._respond(request, "completion", completion_question(body))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": list((await self._models()).values())})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}, where the name may be whatever a question may name: also an alias, or no version."""
        name, known = request.path_params["name"], await self._models()
        if name not in known:
            known[name] = {**known[await self._host.served_name(name)], "id": name}
        return JSONResponse(known[name])

    async def _models(self) -> dict[str, dict[str, Any]]:
        """Return what can be asked, by name. An alias is a model of its own whose `root` is what it points at."""
        serving = self._host.serving()
        found = {serving.name: _entry(serving.name, serving.load_time, None)}
        for adapter in serving.adapters.list():
            found[adapter.name] = _entry(adapter.name, adapter.load_time, serving.name)
        for alias, name in (await self._host.served_aliases()).items():
            if name in found:
                found[alias] = {**found[name], "id": alias}
                found[name]["aliases"].append(alias)
        return found

    async def _respond(self, request: Request, kind: Kind, asked: HttpQuestion) -> Response:
        if not asked.stream:
            return await _until_disconnect(request, self._whole(kind, asked))
        stream = self._events(kind, asked)
        try:
            # Whatever fails before the first token is a plain HTTP error, not an event in a stream that began well.
            first = await _until_disconnect(request, anext(stream))
        except BaseException:
            await stream.aclose()
            raise
        if isinstance(first, Response):
            await stream.aclose()
            return first
        return _EventStream(first, stream)

    async def _whole(self, kind: Kind, asked: HttpQuestion) -> Response:
        async with self._generation.answer(asked.question) as answer:
            async with aclosing(answer.pieces()) as pieces:
                async for _ in pieces:
                    pass
            await answer.keep()
            return JSONResponse(Shape(kind, answer, include_usage=True).whole())

    async def _events(self, kind: Kind, asked: HttpQuestion) -> AsyncGenerator[bytes, None]:
        begun = False
        try:
            async with self._generation.answer(asked.question) as answer:
                shape = Shape(kind, answer, include_usage=asked.include_usage)
                async with aclosing(answer.pieces()) as pieces:
                    async for piece in pieces:
                        if piece.finish_reason:
                            await answer.keep()
                        content = shape.piece(piece)
                        if content is not None:
                            yield event(content)
                            begun = True
                last = shape.last()
                if last is not None:
                    yield event(last)
            yield DONE
        except LoralineError as error:
            if not begun:
                raise
            yield event(errors.error_body(told_to_callers(error)))


def _entry(name: str, loaded: datetime, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(loaded.timestamp()),
        "owned_by": "loraline",
        "root": name,
        "parent": parent,
        "aliases": [],
    }


class _EventStream(StreamingResponse):
    """Server-sent events; the source is closed however the response ends, and the engine's slot with it."""

    def __init__(self, first: bytes, source: AsyncGenerator[bytes, None]):
        self._source = source
        super().__init__(_chain(first, source), media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for item in rest:
        yield item


async def _until_disconnect(request: Request, work: Any) -> Any:
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
