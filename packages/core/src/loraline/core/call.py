"""The call that is being served: its method and its id, for log lines and for answers that callers can ask about."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

HEADER = "x-request-id"
"""Name of the metadata entry and HTTP header that carries a call's id, both ways."""

_GOOD = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class Call:
    """One call. Its id is the caller's, where that is a decent one, else random; it is settled when first asked for."""

    __slots__ = ("_headers", "_id", "caller", "method")

    def __init__(self, method: str, headers: Iterable[Any]):
        self.method = method
        """`/package.Service/Method`, or an HTTP path."""
        self.caller = ""
        """Name of the API key; empty before it is known and where authentication is off."""
        self._headers = headers
        self._id = ""

    @property
    def request_id(self) -> str:
        """The call's id."""
        if not self._id:
            self._id = _given(self._headers) or secrets.token_hex(8)
        return self._id

    def facts(self) -> dict[str, str]:
        """Return what log lines tell of the call."""
        told = {"request_id": self.request_id, "method": self.method}
        return told | ({"key": self.caller} if self.caller else {})


_call: ContextVar[Call | None] = ContextVar("loraline_call", default=None)


def current_call() -> Call | None:
    """Return the call that this task serves; None outside of one."""
    return _call.get()


def begin_call(call: Call) -> None:
    """Remember the call for the rest of the current task."""
    _call.set(call)


def _given(headers: Iterable[Any]) -> str:
    for name, value in headers or ():
        if (name.decode("latin-1").lower() if isinstance(name, bytes) else name) == HEADER:
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            return text if _GOOD.fullmatch(text) else ""
    return ""
