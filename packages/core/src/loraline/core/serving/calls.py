"""One method with everything around it: parsing, validation, the handler, errors and counts."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from loraline.core.errors import LoralineError, invalid_argument, unsupported
from loraline.core.serving.grpc_metrics import MethodStats
from loraline.core.serving.statuses import abort, as_error
from loraline.core.serving.validation import check

_OK, _CANCELLED, _UNKNOWN, _DEADLINE = 0, 1, 2, 4
_Context = Any  # grpc.aio.ServicerContext is a Cython class whose stubs lack what is used here
Follow = Callable[[str, _Context, Awaitable[None]], Awaitable[None]]
"""Awaits a stream of the method, which may be one that a stopping server ends."""


def _not_served(method: str) -> Callable[[Any, _Context], Awaitable[None]]:
    async def refuse(_request: Any, _context: _Context) -> None:
        raise unsupported(method, "Ask a server whose version serves it.")

    return refuse


class _CountingContext:
    """A servicer context that counts what the handler writes itself."""

    def __init__(self, context: _Context, stats: MethodStats):
        self._context = context
        self._stats = stats

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        self._stats.sent += 1


class Method:
    """One method with everything around it; its functions are what grpc calls."""

    __slots__ = ("_behaviour", "_follow", "_method", "_parse", "_stats", "style")

    def __init__(self, follow: Follow, method: str, stats: MethodStats, handler: Any):
        self._follow = follow
        self._method = method
        self._stats = stats
        self._parse: Callable[[bytes], Any] = handler.request_deserializer
        self._behaviour: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        yields = inspect.isasyncgenfunction(self._behaviour)
        if not yields and not inspect.iscoroutinefunction(self._behaviour):
            # The generated base classes answer so for methods that a stage does not override.
            self._behaviour = _not_served(method)
        self.style = "generator" if yields else "writer"

    async def unary_unary(self, raw: bytes, context: _Context) -> Any:
        """Serve a unary call; kept flat, for it is the path that most calls take."""
        stats = self._stats
        stats.begin()
        begun = time.perf_counter()
        code = _UNKNOWN
        try:
            request = self._parsed(raw)
            response = await self._behaviour(request, context)
            stats.sent += 1
            code = _code_of(context)
            return response
        except BaseException as exception:
            code, error = outcome(exception, context, self._method)
            if error is None:
                raise
            await abort(context, error)
        finally:
            stats.end(code, time.perf_counter() - begun)

    async def stream_unary(self, raw: AsyncIterator[bytes], context: _Context) -> Any:
        """Serve a call with a stream of requests."""
        async with _Timed(self._stats, self._method, context):
            response = await self._behaviour(self._messages(raw), context)
            self._stats.sent += 1
            return response

    async def unary_stream_generator(self, raw: bytes, context: _Context) -> None:
        """Serve a call whose handler yields its responses."""
        async with _Timed(self._stats, self._method, context):
            request = self._parsed(raw)
            await self._follow(self._method, context, self._pump(request, context))

    async def unary_stream_writer(self, raw: bytes, context: _Context) -> None:
        """Serve a call whose handler writes its responses to the context."""
        async with _Timed(self._stats, self._method, context):
            request = self._parsed(raw)
            work = self._behaviour(request, _CountingContext(context, self._stats))
            await self._follow(self._method, context, work)

    async def stream_stream_generator(self, raw: AsyncIterator[bytes], context: _Context) -> None:
        """Serve a call with streams both ways whose handler yields."""
        async with _Timed(self._stats, self._method, context):
            await self._follow(self._method, context, self._pump(self._messages(raw), context))

    async def stream_stream_writer(self, raw: AsyncIterator[bytes], context: _Context) -> None:
        """Serve a call with streams both ways whose handler writes to the context."""
        async with _Timed(self._stats, self._method, context):
            work = self._behaviour(self._messages(raw), _CountingContext(context, self._stats))
            await self._follow(self._method, context, work)

    async def _pump(self, request: Any, context: _Context) -> None:
        # Writing here, instead of being a generator ourselves, sees errors of the handler and of the wire alike.
        responses: AsyncGenerator[Any, None] = self._behaviour(request, context)
        async with aclosing(responses):
            async for response in responses:
                await context.write(response)
                self._stats.sent += 1

    async def _messages(self, raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for piece in raw:
            yield self._parsed(piece)

    def _parsed(self, raw: bytes) -> Any:
        try:
            message = self._parse(raw)
        except DecodeError as error:
            text = f"The request of {self._method} is no message of its type. Use stubs made from this server's protos."
            raise invalid_argument("MALFORMED_REQUEST", text) from error
        self._stats.received += 1
        check(message)
        return message


class _Timed:
    """Counts one call with streams from its begin to its end, and answers with the status of what went wrong."""

    __slots__ = ("_begun", "_context", "_method", "_stats")

    def __init__(self, stats: MethodStats, method: str, context: _Context):
        self._stats = stats
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        self._stats.begin()
        self._begun = time.perf_counter()

    async def __aexit__(self, kind: object, exception: BaseException | None, traceback: object) -> None:
        code, error = _UNKNOWN, None
        try:
            if exception is None:
                code = _code_of(self._context)
                return
            code, error = outcome(exception, self._context, self._method)
            if error is not None:
                await abort(self._context, error)
        finally:
            self._stats.end(code, time.perf_counter() - self._begun)


def outcome(exception: BaseException, context: _Context, method: str) -> tuple[int, LoralineError | None]:
    """Return the status code of a failed call, and the error to answer with; None where grpc acts by itself."""
    if isinstance(exception, grpc.aio.AbortError):
        return _code_of(context), None
    if isinstance(exception, asyncio.CancelledError):
        left = context.time_remaining()
        return (_DEADLINE if left is not None and left <= 0 else _CANCELLED), None
    if not isinstance(exception, Exception):
        return _UNKNOWN, None
    error = as_error(exception, method)
    return error.code.value[0], error


def _code_of(context: _Context) -> int:
    code = context.code()
    return code.value[0] if isinstance(code, grpc.StatusCode) else int(code or _OK)
