"""The one error type of the platform: everything a `google.rpc.Status` can say, as a Python exception.

Raise :class:`LoralineError` (or a helper below) anywhere: in a servicer, in a job's child process, in a store. The
server turns it into a gRPC status with typed details; the job engine stores the same status in the job's record, so
that a job that failed an hour ago explains itself as well as a call that failed just now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "loraline"
HELP_PAGE = "docs/troubleshooting.md"
"""Where reasons are explained; relative to the repository, as the project is not tied to one host."""


@dataclass
class LoralineError(Exception):
    """A failure that names its thing and its remedy.

    `code` is a gRPC status code; `reason` a stable word in capitals that programs may rely on (documented in
    docs/troubleshooting.md, where it is also the anchor); `message` says in one or two sentences what happened and
    what to do. `fields` maps request field paths to what is wrong with them; `metadata` carries names and figures;
    `retry_after` and `quota` (quota id -> description) are for limits.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    fields: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: timedelta | None = None
    quota: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self):
        """Survive pickling, as concurrent.futures asks for."""
        args = (self.code, self.reason, self.message, self.fields, self.metadata, self.retry_after, self.quota)
        return (LoralineError, args)

    def to_status(self) -> status_pb2.Status:
        """Return the same as a `google.rpc.Status` with ErrorInfo, BadRequest, RetryInfo, QuotaFailure and Help."""
        details: list[any_pb2.Any] = []

        def add(message: object) -> None:
            packed = any_pb2.Any()
            packed.Pack(message)  # type: ignore[arg-type]
            details.append(packed)

        add(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata))
        if self.fields:
            violations = [
                error_details_pb2.BadRequest.FieldViolation(field=path, description=text)
                for path, text in self.fields.items()
            ]
            add(error_details_pb2.BadRequest(field_violations=violations))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromTimedelta(self.retry_after)
            add(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.quota:
            add(
                error_details_pb2.QuotaFailure(
                    violations=[
                        error_details_pb2.QuotaFailure.Violation(subject=subject, description=text)
                        for subject, text in self.quota.items()
                    ]
                )
            )
        anchor = self.reason.lower().replace("_", "-")
        link = error_details_pb2.Help.Link(description=f"What to do about {self.reason}", url=f"{HELP_PAGE}#{anchor}")
        add(error_details_pb2.Help(links=[link]))
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=details)

    @classmethod
    def from_status(cls, status: status_pb2.Status) -> LoralineError:
        """Rebuild the error from a status; details of other kinds are left out."""
        name = code_pb2.Code.Name(status.code)  # type: ignore[arg-type]
        error = cls(grpc.StatusCode[name], "UNKNOWN", status.message)
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry, quota = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
        for detail in status.details:
            if detail.Unpack(info):
                error.reason, error.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                error.fields = {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(retry):
                error.retry_after = retry.retry_delay.ToTimedelta()
            elif detail.Unpack(quota):
                error.quota = {v.subject: v.description for v in quota.violations}
        return error


def invalid_argument(reason: str, message: str, **fields: str) -> LoralineError:
    """INVALID_ARGUMENT; keyword arguments name the fields, with `__` for the dot: `source__path="…"`."""
    paths = {name.replace("__", "."): text for name, text in fields.items()}
    return LoralineError(grpc.StatusCode.INVALID_ARGUMENT, reason, message, fields=paths)


def not_found(reason: str, message: str, **metadata: str) -> LoralineError:
    """NOT_FOUND."""
    return LoralineError(grpc.StatusCode.NOT_FOUND, reason, message, metadata=metadata)


def already_exists(reason: str, message: str, **metadata: str) -> LoralineError:
    """ALREADY_EXISTS."""
    return LoralineError(grpc.StatusCode.ALREADY_EXISTS, reason, message, metadata=metadata)


def failed_precondition(reason: str, message: str, **metadata: str) -> LoralineError:
    """FAILED_PRECONDITION."""
    return LoralineError(grpc.StatusCode.FAILED_PRECONDITION, reason, message, metadata=metadata)


def data_loss(reason: str, message: str, **metadata: str) -> LoralineError:
    """DATA_LOSS: content does not match its digest."""
    return LoralineError(grpc.StatusCode.DATA_LOSS, reason, message, metadata=metadata)


def resource_exhausted(reason: str, message: str, **metadata: str) -> LoralineError:
    """RESOURCE_EXHAUSTED: disk, memory, queue or quota."""
    return LoralineError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, metadata=metadata)


def unavailable(reason: str, message: str, **metadata: str) -> LoralineError:
    """UNAVAILABLE: something outside is out of reach; trying again may help."""
    return LoralineError(grpc.StatusCode.UNAVAILABLE, reason, message, metadata=metadata)


def unsupported(feature: str, remedy: str) -> LoralineError:
    """UNIMPLEMENTED for a part of the contract that this version does not serve; never ignored silently."""
    return LoralineError(grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED", f"{feature} is not supported yet. {remedy}")
