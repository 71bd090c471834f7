"""The port between the job engine and a stage: what a job handler is and how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from google.protobuf.message import Message


@dataclass(frozen=True)
class JobHandler:
    """One kind of job.

    `entry` is `package.module:function`. It is imported in the job's own child process and called as
    `function(context: JobContext, request: <request_type>) -> Message | None`; the message it returns is the job's
    result. It may raise LoralineError (FAILED), JobPaused (PAUSED) or let StopRequested through (cancel, pause or
    hand-over, whichever was asked).
    """

    kind: str
    request_type: type[Message]
    entry: str


class JobPaused(Exception):
    """Raised by a handler that cannot go on now but keeps its progress, such as on an exhausted quota."""

    def __init__(self, reason: str, message: str, retry_time: datetime | None = None):
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_time = retry_time


class StopRequested(Exception):
    """Raised by JobContext.check_stop when the job shall stop: `cause` is `cancel`, `pause` or `handover`."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause
