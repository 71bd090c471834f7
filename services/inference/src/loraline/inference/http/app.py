"""The ASGI application: /v1/chat/completions, /v1/completions, /v1/models, /v1/sessions, /v1/profiles, /generate.

API keys are the platform's: its server puts them in front of every stage's HTTP app.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraline.core.errors import LoralineError, not_found
from loraline.core.private_paths import told_to_callers
from loraline.inference.generation import Generation
from loraline.inference.host import ModelHost
from loraline.inference.http import errors
from loraline.inference.http.generate import generate_route
from loraline.inference.http.profiles import profile_routes
from loraline.inference.http.requests import HttpQuestion, chat_question, completion_question, read_body
from loraline.inference.http.responses import DONE, Kind, Shape, event
from loraline.inference.http.sessions import session_routes
from loraline.inference.http.streaming import EventStream, until_disconnect
from loraline.inference.http.tool_answers import ToolAnswers, check_template, tool_answers
from loraline.inference.profiles.registry import Profiles
from loraline.inference.profiles.relay import Relay
from loraline.inference.sessions.calls import SessionCalls
from loraline.inference.structured.answering import streamed, whole


def create_app(generation: Generation, sessions: SessionCalls, profiles: Profiles, relay: Relay) -> Starlette:
    """Return the application; it needs nothing started, and answers 503 while no model is loaded."""
    routes = _Routes(generation)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/embeddings", routes.embeddings, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            generate_route(generation),
            *session_routes(sessions),
            *profile_routes(generation, profiles, relay),
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

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: no engine here can, for what generates has no pooling layer."""
        engine = self._host.serving().engine.facts.engine
        message = (
            f"There are no embeddings here: {engine} runs {self._host.serving().name} to generate text, and an engine "
            "does one or the other. Ask a server of an embedding model."
        )
        raise not_found("EMBEDDINGS_NOT_SERVED", message, engine=engine)

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
        asked, tools = await self._with_tools(asked)
        if not asked.stream:
            return await until_disconnect(request, self._whole(kind, asked, tools))
        stream = self._events(kind, asked, tools)
        try:
            # Whatever fails before the first token is a plain HTTP error, not an event in a stream that began well.
            first = await until_disconnect(request, anext(stream))
        except BaseException:
            await stream.aclose()
            raise
        if isinstance(first, Response):
            await stream.aclose()
            return first
        return EventStream(first, stream)

    async def _with_tools(self, asked: HttpQuestion) -> tuple[HttpQuestion, ToolAnswers | None]:
        """Return how an answer that may call tools is read; INVALID_ARGUMENT TOOLS_NOT_SUPPORTED where none may."""
        chat_format = self._host.serving().chat_format
        question, tools = asked.question, asked.tools
        about_calls = any(message.keys() - {"role", "content"} for message in question.messages)
        if tools is None or tools.choice == "none":
            if about_calls:
                await asyncio.to_thread(check_template, chat_format)
            return asked, None
        parser = self._host.settings.tool_parser
        reading, special = await asyncio.to_thread(tool_answers, tools, chat_format, parser)
        if special:
            question = replace(question, sampling=replace(question.sampling, show_special=True))
        return replace(asked, question=question), reading

    async def _whole(self, kind: Kind, asked: HttpQuestion, tools: ToolAnswers | None) -> Response:
        answer = await whole(self._generation, asked.question)
        told = asked.question.sampling.logprobs
        return JSONResponse(Shape(kind, answer, include_usage=True, tools=tools, logprobs=told).whole())

    async def _events(self, kind: Kind, asked: HttpQuestion, tools: ToolAnswers | None) -> AsyncGenerator[bytes, None]:
        begun = False
        try:
            shape = None
            held = asked.tools is not None and asked.tools.forced
            async with aclosing(streamed(self._generation, asked.question, held=held)) as pieces:
                async for answer, piece in pieces:
                    shape = shape or Shape(
                        kind,
                        answer,
                        include_usage=asked.include_usage,
                        tools=tools,
                        logprobs=asked.question.sampling.logprobs,
                    )
                    content = shape.piece(piece)
                    if content is not None:
                        yield event(content)
                        begun = True
            last = shape.last() if shape else None
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
