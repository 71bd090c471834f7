"""The server's one interceptor: keys, validation, errors and counts for every call.

It wraps each method once and keeps the wrapper, so that a call costs one dictionary look-up more than a bare one. It
parses requests itself: a caller without a key gets nothing parsed, and a broken message gets a typed answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio

from loraline.core import tracing
from loraline.core.call import Call, begin_call
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import (
    ANONYMOUS,
    OPEN_SERVICES,
    KeyRing,
    Principal,
    missing_key,
    role_missing,
    set_principal,
    unknown_key,
)
from loraline.core.serving.calls import Method
from loraline.core.serving.grpc_metrics import GrpcMetrics
from loraline.core.serving.statuses import abort
from loraline.core.serving.traced import traced_method

FOLLOWING_METHODS = frozenset(
    {
        "/grpc.health.v1.Health/Watch",
        "/loraline.api.job.v1.JobService/WatchJob",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
"""Streams that may last for ever; a server that stops ends them instead of waiting for them."""

_GRPC_TYPES = {
    "unary_unary": "unary",
    "unary_stream": "server_stream",
    "stream_unary": "client_stream",
    "stream_stream": "bidi_stream",
}
_Context = Any  # grpc.aio.ServicerContext is a Cython class whose stubs lack what is used here


def key_of(metadata: Any) -> str:
    """Return the API key that the call's metadata carry; empty for none."""
    other = ""
    for name, value in metadata:
        if name == "authorization":
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
        elif name == "x-api-key":
            other = value
    return other if isinstance(other, str) else ""


class PlatformInterceptor(grpc.aio.ServerInterceptor):
    """Checks the key and the request, maps errors to statuses, and counts. `ring` None means no authentication."""

    def __init__(self, metrics: GrpcMetrics, ring: KeyRing | None):
        self._metrics = metrics
        self._ring = ring
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._following: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the method's wrapped handler, or one that refuses the caller."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return handler  # grpc answers UNIMPLEMENTED
            wrapped = self._wrapped[method] = self._wrap(handler, method)
        # grpc runs the handler in this same task, so what is set here is seen there.
        call = Call(method, handler_call_details.invocation_metadata)
        begin_call(call)
        if self._ring is None:
            set_principal(ANONYMOUS)
            return wrapped
        error = self._authenticate(method, call, handler_call_details.invocation_metadata)
        return wrapped if error is None else self._refusal(wrapped, method, error)

    def in_flight(self) -> int:
        """Return how many calls are being served, without the streams that may last for ever."""
        return sum(s.in_flight for path, s in self._metrics.methods.items() if path not in FOLLOWING_METHODS)

    def end_following(self) -> None:
        """End the streams that may last for ever with UNAVAILABLE, now and from now on."""
        self._stopping = True
        for task in self._following:
            task.cancel()

    def _authenticate(self, method: str, call: Call, metadata: Any) -> LoralineError | None:
        assert self._ring is not None  # noqa: S101 - for the type checker
        if method.startswith(OPEN_SERVICES):
            set_principal(None)
            return None
        key = key_of(metadata)
        principal: Principal | None = self._ring.verify(key) if key else None
        set_principal(principal)
        if principal is None:
            return unknown_key() if key else missing_key()
        call.caller = principal.name
        return None if principal.may_call(method) else role_missing(principal, method)

    def _wrap(self, handler: Any, method: str) -> grpc.RpcMethodHandler:
        kind = _kind(handler)
        call = Method(self.follow, method, self._metrics.of(_GRPC_TYPES[kind], method), handler)
        wrapper = getattr(call, kind if not handler.response_streaming else f"{kind}_{call.style}")
        if tracing.on():
            wrapper = traced_method(wrapper, method)
        return _handler(kind, wrapper, handler.response_serializer)

    def _refusal(self, wrapped: Any, method: str, error: LoralineError) -> grpc.RpcMethodHandler:
        kind = _kind(wrapped)
        stats = self._metrics.of(_GRPC_TYPES[kind], method)

        async def refuse(_request: Any, context: _Context) -> None:
            stats.begin()
            try:
                await abort(context, error)
            finally:
                stats.end(error.code.value[0], 0.0)

        return _handler(kind, refuse, None)

    async def follow(self, method: str, context: _Context, work: Awaitable[None]) -> None:
        """Await a stream; `end_following` ends it when it is one that may last for ever."""
        if method not in FOLLOWING_METHODS:
            await work
            return
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - handlers run in tasks
        self._following.add(task)
        try:
            await work
        except asyncio.CancelledError:
            if not self._stopping or context.cancelled():
                raise
            task.uncancel()
            text = "The server is stopping. Ask again in a moment; a job's stream goes on where it was cut."
            raise LoralineError(
                grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING", text, retry_after=timedelta(seconds=1)
            ) from None
        finally:
            self._following.discard(task)


def _kind(handler: Any) -> str:
    return f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"


def _handler(kind: str, behaviour: Any, serializer: Any) -> grpc.RpcMethodHandler:
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(behaviour, request_deserializer=None, response_serializer=serializer)
