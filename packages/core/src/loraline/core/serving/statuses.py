"""Turns any exception of a handler into one error, and that error into a status that fits into gRPC's trailers."""

from __future__ import annotations

import errno
import secrets
import urllib.parse
from typing import Any

import grpc
import grpc.aio
import sqlalchemy.exc
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from loraline.core.call import HEADER, current_call
from loraline.core.errors import LoralineError, resource_exhausted, unavailable
from loraline.core.private_paths import told_to_callers

_TRAILER_BYTES = 6500
"""gRPC peers refuse trailers above 8 KiB; the rest is room for the other headers."""
_DATABASE_ERRORS = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
log = structlog.get_logger("loraline.grpc")


def as_error(exception: BaseException, method: str) -> LoralineError:
    """Return the error that the caller shall see; what callers must not see goes to the log under an error id."""
    if isinstance(exception, LoralineError):
        return told_to_callers(exception)
    if isinstance(exception, _DATABASE_ERRORS):
        log.error("database failed", method=method, error=str(exception))
        text = "The server's database does not answer. Try again; /healthz and the server's log say more."
        return unavailable("DATABASE_UNAVAILABLE", text)
    if isinstance(exception, OSError) and exception.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("disk full", method=method, error=str(exception))
        text = "The server's disk is full. Free space in its data folder or its store, then try again."
        return resource_exhausted("DISK_FULL", text)
    if isinstance(exception, ConnectionError | TimeoutError):
        log.error("a backend is out of reach", method=method, error=str(exception), exc_info=exception)
        text = "Something that the server needs is out of reach. Try again; the server's log names it."
        return unavailable("BACKEND_UNAVAILABLE", text)
    error_id = secrets.token_hex(6)
    log.error("unexpected error", method=method, error_id=error_id, exc_info=exception)
    text = f"The server failed in a way nobody foresaw. Its log tells more under error id {error_id}."
    return LoralineError(grpc.StatusCode.INTERNAL, "UNEXPECTED_ERROR", text, metadata={"error_id": error_id})


def _trailer_bytes(status: status_pb2.Status) -> int:
    # grpc-message is percent-encoded, which triples Chinese and Korean; the binary trailer may travel as base64.
    return len(urllib.parse.quote(status.message)) + status.ByteSize() * 4 // 3


def fit_status(error: LoralineError) -> status_pb2.Status:
    """Return the error's status, shortened until it fits into gRPC's trailers: fields first, the text last."""
    status = error.to_status()
    if _trailer_bytes(status) <= _TRAILER_BYTES:
        return status
    fields, metadata, quota = list(error.fields.items()), dict(error.metadata), dict(error.quota)
    message = error.message
    while _trailer_bytes(status) > _TRAILER_BYTES:
        if len(fields) > 1:
            fields = fields[: len(fields) // 2]
        elif metadata or quota:
            metadata, quota = {}, {}
        elif fields and len(fields[0][1]) > 200:
            fields = [(fields[0][0][:200], fields[0][1][:199] + "…")]
        elif len(message) > 100:
            message = message[: len(message) * 2 // 3] + "…"
        else:
            fields = []
        short = LoralineError(error.code, error.reason, message, dict(fields), metadata, error.retry_after, quota)
        status = short.to_status()
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: LoralineError) -> None:
    """End the call with the error, and tell the log; never returns, as grpc's own abort."""
    status = rpc_status.to_status(fit_status(error))
    call, trailing = current_call(), status.trailing_metadata
    if call is not None:
        log.info("call_failed", code=error.code.name, reason=error.reason)
        trailing = (*trailing, (HEADER, call.request_id))
    await context.abort(status.code, status.details, trailing)
