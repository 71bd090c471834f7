"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

import grpc
import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse

from loraline.core.errors import LoralineError
from loraline.core.private_paths import told_to_callers

_log = structlog.get_logger(__name__)
_STATUSES: dict[grpc.StatusCode, tuple[int, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.OUT_OF_RANGE: (400, "invalid_request_error"),
    grpc.StatusCode.UNIMPLEMENTED: (400, "invalid_request_error"),
    # Not 409: clients retry that, and a failed proof fails again.
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "invalid_request_error"),
    grpc.StatusCode.ABORTED: (409, "conflict_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "server_error"),
}
_NOT_READY = {"NO_MODEL_LOADED", "ENGINE_NOT_INSTALLED"}
_CODES = {"MODEL_NOT_SERVED": "model_not_found", "PROMPT_TOO_LONG": "context_length_exceeded"}


def error_body(error: LoralineError) -> dict[str, Any]:
    """Return the `error` object of a response or of a stream's event."""
    _, kind = _STATUSES.get(error.code, (500, "server_error"))
    field = next(iter(error.fields), "")
    if error.reason == "MODEL_NOT_SERVED":
        field = "model"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": field.removeprefix("sampling.") or None,
            "code": _CODES.get(error.reason, error.reason.lower()),
        }
    }


def error_response(error: LoralineError) -> JSONResponse:
    """Return the HTTP answer to an error, with Retry-After where it is known."""
    status, _ = _STATUSES.get(error.code, (500, "server_error"))
    if error.reason in _NOT_READY:
        status = 503
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after.total_seconds())))
    return JSONResponse(error_body(error), status, headers)


async def on_loraline_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a typed error."""
    assert isinstance(error, LoralineError)  # noqa: S101 - registered for nothing else
    return error_response(told_to_callers(error))


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer Starlette's own errors: unknown routes and methods."""
    status = getattr(error, "status_code", 500)
    message = (
        f"There is no {request.method} {request.url.path}. There are /v1/chat/completions, /v1/completions, "
        "/v1/models, /v1/profiles, /v1/sessions and /generate."
    )
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "unknown_url"}}
    return JSONResponse(body, status)


async def on_any_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what nobody expected without telling its insides."""
    _log.error("http_request_failed", path=request.url.path, exc_info=error)
    message = "The server failed on this request; its log says why."
    return JSONResponse({"error": {"message": message, "type": "server_error", "param": None, "code": "internal"}}, 500)
