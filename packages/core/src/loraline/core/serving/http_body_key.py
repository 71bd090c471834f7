"""API keys in the body of a request, for the few paths whose clients send them there."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import grpc

from loraline.core.errors import LoralineError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
MAX_BODY_BYTES = 16 * 1024 * 1024
BODY_KEY_PATHS = frozenset({"/generate"})
"""Paths that take `api_key` from a JSON body when no header has a key."""


async def read_key(receive: Receive) -> tuple[str, Receive]:
    """Read a request's body and return the key in it, empty for none, and what gives the app the same body again."""
    body, complete = b"", False
    while not complete:
        message = await receive()
        if message["type"] != "http.request":
            return "", _again([message], receive)
        body += message.get("body", b"")
        complete = not message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            text = f"The request is larger than {MAX_BODY_BYTES} bytes. Send less."
            raise LoralineError(grpc.StatusCode.INVALID_ARGUMENT, "BODY_TOO_LARGE", text)
    return _key_in(body), _again([{"type": "http.request", "body": body, "more_body": False}], receive)


def _key_in(body: bytes) -> str:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the caller is told that a key is missing; what else is wrong is nobody's business yet
    key = content.get("api_key") if isinstance(content, dict) else None
    return key.strip() if isinstance(key, str) else ""


def _again(messages: list[MutableMapping[str, Any]], receive: Receive) -> Receive:
    async def replay() -> MutableMapping[str, Any]:
        return messages.pop(0) if messages else await receive()

    return replay
