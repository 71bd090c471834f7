"""What goes wrong, as Python exceptions: a server's `google.rpc.Status` with its details unpacked."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.rpc import code_pb2, error_details_pb2, status_pb2

if TYPE_CHECKING:
    from loraline.api.job.v1 import job_pb2

SERVER_UNREACHABLE = "SERVER_UNREACHABLE"
"""Reason of errors where no server answered at all."""


@dataclass
class LoralineApiError(Exception):
    """A call that failed, or input that the client itself refuses.

    `reason` is a stable word in capitals; `message` says what happened and what to do; `fields` maps request field
    paths to what is wrong with them; `metadata` carries names and figures; `help` holds links; `address` is the
    server that was asked (empty for errors found before any call).
    """

    code: grpc.StatusCode
    reason: str
    message: str
    fields: dict[str, str] = field(default_factory=dict)
    help: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: timedelta | None = None
    address: str = ""

    def __str__(self) -> str:
        lines = [self.message, *(f"  {path}: {text}" for path, text in self.fields.items())]
        return "\n".join(lines)

    def __reduce__(self):
        """Survive pickling, as process pools ask for."""
        args = (self.code, self.reason, self.message, self.fields, self.help, self.metadata, self.retry_after)
        return (LoralineApiError, (*args, self.address))

    @property
    def unreachable(self) -> bool:
        """Whether no server answered, as opposed to a server that answered with an error."""
        return self.reason == SERVER_UNREACHABLE

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain data for JSON."""
        entries = {
            "code": self.code.name,
            "reason": self.reason,
            "message": self.message,
            "fields": self.fields,
            "metadata": self.metadata,
            "help": list(self.help),
            "address": self.address,
        }
        return {name: value for name, value in entries.items() if value}


class JobNotSuccessful(LoralineApiError):
    """A job that was waited for and did not succeed; `job` is its record."""

    job: job_pb2.Job


def from_status(status: status_pb2.Status, address: str = "") -> LoralineApiError:
    """Return the error that a `google.rpc.Status` describes; details of unknown kinds are left out."""
    name = code_pb2.Code.Name(status.code)  # type: ignore[arg-type]
    error = LoralineApiError(grpc.StatusCode[name], name, status.message, address=address)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    links, retry, quota = error_details_pb2.Help(), error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    for detail in status.details:
        if detail.Unpack(info):
            error.reason, error.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            error.fields.update({v.field: v.description for v in bad.field_violations})
        elif detail.Unpack(links):
            error.help = tuple(link.url for link in links.links)
        elif detail.Unpack(retry):
            error.retry_after = retry.retry_delay.ToTimedelta()
        elif detail.Unpack(quota):
            error.fields.update({v.subject: v.description for v in quota.violations})
    return error


def from_rpc_error(error: grpc.aio.AioRpcError, address: str = "") -> LoralineApiError:
    """Return the error that a failed call describes; one without details from a server is told by its code."""
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
            return from_status(status, address)
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"No server answers at {address}."
        return LoralineApiError(code, SERVER_UNREACHABLE, message, metadata={"cause": text}, address=address)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"The server at {address} did not answer in time."
        return LoralineApiError(code, "DEADLINE_EXCEEDED", message, address=address)
    return LoralineApiError(code, code.name, text or code.name, address=address)
