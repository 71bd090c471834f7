"""The same API keys in front of a stage's HTTP app, refusing in the error shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from typing import Any

import grpc
import structlog

from loraline.core.call import HEADER, Call, begin_call
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import (
    ANONYMOUS,
    KeyRing,
    Principal,
    missing_key,
    role_missing,
    set_principal,
    unknown_key,
)
from loraline.core.serving.http_body_key import BODY_KEY_PATHS, read_key
from loraline.core.serving.traced import App, Receive, Scope, Send, traced_app

OPEN_PATHS = frozenset({"/health", "/healthz"})
"""Paths that answer without a key; they must tell nothing but whether the server is well."""
OPERATE_PREFIXES = ("/admin/",)
"""Paths that need `operate`; all others are open to `chat` too."""

log = structlog.get_logger("loraline.http")
_STATUSES = {
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
}


class HttpKeyAuth:
    """ASGI middleware: lets a request through when its key is known and its role suffices; 401 or 403 otherwise.

    The key is read from `Authorization: Bearer` or `x-api-key`, and on the paths `body_key_paths` from `api_key` in a
    JSON body where no header has one. `ring` None means that authentication is off. `refused` is told the reason of
    each refusal. The caller is in `scope["state"]["principal"]` and in `current_principal()`.
    """

    def __init__(
        self,
        app: App,
        ring: KeyRing | None,
        refused: Callable[[str], None] | None = None,
        *,
        open_paths: frozenset[str] = OPEN_PATHS,
        operate_prefixes: tuple[str, ...] = OPERATE_PREFIXES,
        body_key_paths: frozenset[str] = BODY_KEY_PATHS,
    ):
        self._app = traced_app(app)
        self._ring = ring
        self._refused = refused
        self._open_paths = open_paths
        self._operate_prefixes = operate_prefixes
        self._body_key_paths = body_key_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        call = Call(scope["path"], scope["headers"])
        begin_call(call)
        send = _with_id(send, call.request_id)
        try:
            key = _key_of(scope)
            if not key and self._ring is not None and self._takes_key_in_body(scope):
                key, receive = await read_key(receive)
            principal = self._authenticate(scope, key)
        except LoralineError as error:
            log.info("call_failed", code=error.code.name, reason=error.reason)
            if self._refused is not None and error.code in _STATUSES:
                self._refused(error.reason)
            await _refuse(scope, receive, send, error)
            return
        call.caller = principal.name if principal is not None and principal is not ANONYMOUS else ""
        scope.setdefault("state", {})["principal"] = principal
        set_principal(principal)
        await self._app(scope, receive, send)

    def _takes_key_in_body(self, scope: Scope) -> bool:
        return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._body_key_paths

    def _authenticate(self, scope: Scope, key: str) -> Principal | None:
        if self._ring is None:
            return ANONYMOUS
        path = scope["path"]
        if scope["type"] == "http" and path in self._open_paths:
            return None
        if not key:
            raise missing_key()
        principal = self._ring.verify(key)
        if principal is None:
            raise unknown_key()
        if "operate" not in principal.roles and path.startswith(self._operate_prefixes):
            raise role_missing(principal, path)
        return principal


def _with_id(send: Send, request_id: str) -> Send:
    async def answer(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (HEADER.encode(), request_id.encode())]}
        await send(message)

    return answer


def _key_of(scope: Scope) -> str:
    headers = {name.lower(): value for name, value in scope["headers"]}
    authorization = headers.get(b"authorization", b"").decode("latin-1")
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


async def _refuse(scope: Scope, receive: Receive, send: Send, error: LoralineError) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": error.reason})
        return
    status, kind = _STATUSES.get(error.code, (400, "invalid_request_error"))
    body = json.dumps({"error": {"message": error.message, "type": kind, "param": None, "code": error.reason.lower()}})
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
