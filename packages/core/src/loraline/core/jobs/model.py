"""Jobs as values: states and their legal transitions, names, fingerprints, and rows of the database as messages."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.errors import LoralineError, not_found

QUEUED = job_pb2.JOB_STATE_QUEUED
RUNNING = job_pb2.JOB_STATE_RUNNING
PAUSED = job_pb2.JOB_STATE_PAUSED
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
FAILED = job_pb2.JOB_STATE_FAILED
CANCELLED = job_pb2.JOB_STATE_CANCELLED

ENDED = frozenset({SUCCEEDED, FAILED, CANCELLED})
TRANSITIONS: Mapping[int, frozenset[int]] = {
    QUEUED: frozenset({RUNNING, PAUSED, CANCELLED}),
    RUNNING: frozenset({QUEUED, PAUSED, SUCCEEDED, FAILED, CANCELLED}),
    PAUSED: frozenset({QUEUED, CANCELLED}),
    FAILED: frozenset({QUEUED}),
    CANCELLED: frozenset({QUEUED}),
    SUCCEEDED: frozenset(),
}
"""State -> the states that may follow it. FAILED and CANCELLED are left by ResumeJob only."""

_NAME_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # without look-alikes


class LeaseLost(LoralineError):
    """The job belongs to another runner by now, or to nobody: whoever gets this must stop and write nothing more."""

    def __init__(self, job: str, epoch: int):
        message = f"Job {job} is no longer held under epoch {epoch}; nothing was written. Another runner took it over."
        super().__init__(grpc.StatusCode.ABORTED, "LEASE_LOST", message, metadata={"job": job, "epoch": str(epoch)})


@dataclass(frozen=True)
class NewJob:
    """A job about to be created."""

    kind: str
    spec: Message
    request_id: str = ""
    inputs: tuple[artifact_pb2.ArtifactRef, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    trace: str = ""
    """The caller's span as tracing.to_text wrote it; empty for none."""


@dataclass(frozen=True)
class Claim:
    """A job that a runner holds: every write for it names this epoch."""

    name: str
    kind: str
    epoch: int
    attempt: int
    queue_seconds: float
    trace: str = ""
    """The span that asked for the job, as tracing.to_text wrote it; empty for none."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Takeover:
    """A job whose lease had run out, and the state it was given."""

    name: str
    kind: str
    state: int


@dataclass(frozen=True)
class JobEnd:
    """How an attempt ended: the state to go to and what belongs to it. `note` is added to the log."""

    state: int
    result: Message | None = None
    error: status_pb2.Status | None = None
    pause: job_pb2.PauseInfo | None = None
    note: job_pb2.Note | None = None


@dataclass(frozen=True)
class QueueState:
    """The queue of one kind: how many wait, how many run, and for how long the oldest has waited, in seconds."""

    kind: str
    queued: int
    running: int
    oldest_seconds: float


def new_name(kind: str) -> str:
    """Return a fresh name for a job: `trainer.train` gives `trainer-train-` and 12 random characters."""
    random = "".join(secrets.choice(_NAME_ALPHABET) for _ in range(12))
    return f"{kind.replace('.', '-').replace('_', '-')}-{random}"


def fingerprint(request: Message) -> str:
    """Return a hash over a request's type and content without its request_id, as 64 hex digits."""
    body = type(request)()
    body.CopyFrom(request)
    if "request_id" in body.DESCRIPTOR.fields_by_name:
        body.ClearField("request_id")
    content = body.SerializeToString(deterministic=True)
    return hashlib.sha256(body.DESCRIPTOR.full_name.encode() + b"\0" + content).hexdigest()


def check_transition(name: str, current: int, target: int) -> None:
    """Raise FAILED_PRECONDITION unless a job may go from one state to the other."""
    if target not in TRANSITIONS.get(current, frozenset()):
        raise wrong_state(name, current, f"can't become {state_name(target)}")


def wrong_state(name: str, current: int, problem: str) -> LoralineError:
    """Return FAILED_PRECONDITION for a job whose state does not allow what was asked; it says what can be done."""
    remedies: dict[int, str] = {
        QUEUED: f"`loraline jobs watch {name}` follows it, `loraline jobs cancel {name}` stops it.",
        RUNNING: f"`loraline jobs watch {name}` follows it, `loraline jobs cancel {name}` stops it.",
        PAUSED: f"`loraline jobs resume {name}` lets it go on, `loraline jobs cancel {name}` ends it.",
        SUCCEEDED: f"It is done: `loraline jobs get {name}` shows what it made.",
        FAILED: f"`loraline jobs resume {name}` takes it up again from its last state.",
        CANCELLED: f"`loraline jobs resume {name}` takes it up again from its last state.",
    }
    return LoralineError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "JOB_STATE",
        f"Job {name} is {state_name(current)} and {problem}. {remedies.get(current, '')}".rstrip(),
        metadata={"job": name, "state": state_name(current)},
    )


def no_such_job(name: str) -> LoralineError:
    """Return NOT_FOUND for a job's name."""
    return not_found(
        "JOB_NOT_FOUND", f"There is no job {name!r}. `loraline jobs list` shows those there are.", job=name
    )


def state_name(state: int) -> str:
    """Return a state without its prefix: QUEUED, RUNNING, …"""
    return job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")  # type: ignore[arg-type]


def timestamp(seconds: float) -> Timestamp:
    """Return seconds since the epoch as a protobuf timestamp."""
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return stamp


def refs_to_json(refs: Iterable[artifact_pb2.ArtifactRef]) -> str:
    """Return references as the JSON text that the database keeps."""
    return json.dumps([MessageToDict(ref) for ref in refs], separators=(",", ":"))


def refs_from_json(text: str) -> list[artifact_pb2.ArtifactRef]:
    """Read what refs_to_json wrote."""
    return [ParseDict(item, artifact_pb2.ArtifactRef(), ignore_unknown_fields=True) for item in json.loads(text)]


def job_from_row(row: Any) -> job_pb2.Job:
    """Return a row of the table `jobs` as the message."""
    job = job_pb2.Job(
        name=row.name,
        kind=row.kind,
        state=row.state,
        attempt=row.attempt,
        request_id=row.request_id or "",
        last_sequence=row.last_sequence,
        requested_stop=row.requested_stop,
        labels=json.loads(row.labels),
        inputs=refs_from_json(row.inputs),
        outputs=refs_from_json(row.outputs),
        create_time=timestamp(row.create_time),
    )
    job.spec.ParseFromString(row.spec)
    for name in ("progress", "error", "pause", "result"):
        content = getattr(row, name)
        if content is not None:
            getattr(job, name).MergeFromString(content)
            getattr(job, name).SetInParent()
    for name in ("start_time", "end_time"):
        seconds = getattr(row, name)
        if seconds is not None:
            getattr(job, name).CopyFrom(timestamp(seconds))
    return job


def event_from_row(row: Any) -> job_pb2.JobEvent:
    """Return a row of the table `job_events` as the message; position, time and attempt are in columns."""
    event = job_pb2.JobEvent.FromString(row.payload)
    event.sequence, event.attempt = row.sequence, row.attempt
    event.time.CopyFrom(timestamp(row.time))
    return event


def state_change(before: int, after: int) -> job_pb2.JobEvent:
    """Return the event of a changed state."""
    change = job_pb2.StateChange(to=after)  # type: ignore[arg-type]
    setattr(change, "from", before)  # `from` is a keyword
    return job_pb2.JobEvent(state_change=change)


def warning(reason: str, message: str, **fields: object) -> job_pb2.Note:
    """Return a note of severity WARNING."""
    texts = {key: str(value) for key, value in fields.items()}
    return job_pb2.Note(severity=job_pb2.SEVERITY_WARNING, reason=reason, message=message, fields=texts)
