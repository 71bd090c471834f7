"""Spans around calls of the servers: gRPC methods and a stage's HTTP app. Used only where traces are on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import grpc

from loraline.core import tracing

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

UNTRACED = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Methods that orchestrators and tools call all the time."""

_FAILURES = frozenset(
    code.value[0]
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
"""What OpenTelemetry counts as the server's failure; other codes are the caller's."""


def traced_method(behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    """Return the method's handler with a span around it, as a child of the caller's."""
    if method.startswith(UNTRACED):
        return behaviour
    service, _, name = method.removeprefix("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}

    async def call(request: Any, context: Any) -> Any:
        parent = _texts(context.invocation_metadata())
        begun = tracing.span(f"{service}/{name}", kind="server", parent=parent, attributes=attributes, errors=False)
        with begun as span:
            try:
                return await behaviour(request, context)
            finally:
                code = context.code()
                number = code.value[0] if isinstance(code, grpc.StatusCode) else int(code or 0)
                span.set_attribute("rpc.grpc.status_code", number)
                if number in _FAILURES:
                    span.fail(str(context.details() or ""))

    return call


def _texts(metadata: Any) -> dict[str, str]:
    return {name: value for name, value in metadata or () if isinstance(value, str)}


def traced_app(app: App) -> App:
    """Return the app with a span around each request; the app itself while traces are off."""
    return TracedApp(app) if tracing.on() else app


class TracedApp:
    """ASGI middleware: a span around each request, as a child of the caller's."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in ("/health", "/healthz"):
            await self._app(scope, receive, send)
            return
        parent = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with tracing.span(scope["method"], kind="server", parent=parent, attributes=attributes) as span:

            async def answer(message: Any) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set_attribute("http.response.status_code", status)
                    if status >= 500:
                        span.fail(f"HTTP {status}")
                await send(message)

            try:
                await self._app(scope, receive, answer)
            finally:
                route = _route(scope)
                if route:
                    span.set_attribute("http.route", route)
                    span.update_name(f"{scope['method']} {route}")


def _route(scope: Mapping[str, Any]) -> str:
    """Return the path with its parameters' names for their values; empty for a path that no route has."""
    if "endpoint" not in scope:
        return ""
    names = {str(value): f"{{{name}}}" for name, value in scope.get("path_params", {}).items()}
    return "/".join(names.get(part, part) for part in str(scope["path"]).split("/"))
