"""How attempts end badly or early: the statuses and remarks that say so to people."""

from __future__ import annotations

import errno
import signal
import traceback

import grpc

from loraline.api.job.v1 import job_pb2
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobPaused
from loraline.core.jobs.model import CANCELLED, FAILED, PAUSED, QUEUED, JobEnd, warning
from loraline.core.jobs.payload import settings_secrets
from loraline.core.jobs.redact import redact
from loraline.core.private_paths import hide_folder, told_to_callers

_MEMORY_KNOBS = (
    "Lower the batch size, sequence length or context length of the request, run fewer jobs at a time "
    "(LORALINE_MAX_CONCURRENT_JOBS), or give the machine or container more memory."
)

_FULL_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing file",
    ". unexpected pos ",  # torch's archive is shorter than what was written into it
)


def user_pause(name: str) -> job_pb2.PauseInfo:
    """Return why a job is paused that someone asked to pause."""
    message = f"Paused on request. `loraline jobs resume {name}` goes on where it stopped."
    return job_pb2.PauseInfo(reason="USER_REQUEST", message=message)


def worker_lost(note: job_pb2.Note, losses: int) -> LoralineError:
    """Return the error of a job whose process was lost too often; `note` tells of the last time."""
    times = "once" if losses == 1 else f"{losses} times"
    message = f"The job's process was lost {times}, so it is not started again. The last time: {note.message}"
    metadata = {**dict(note.fields), "losses": str(losses)}
    return LoralineError(grpc.StatusCode.INTERNAL, "WORKER_LOST", message, metadata=metadata)


def death_note(return_code: int, log_tail: str = "") -> job_pb2.Note:
    """Return the remark about a child process that ended without writing how, from its subprocess return code."""
    fields: dict[str, object] = {}
    if return_code < 0:
        try:
            name = signal.Signals(-return_code).name
        except ValueError:
            name = f"signal {-return_code}"
        fields["signal"] = name
        text = f"it was killed by {name}."
        if -return_code == signal.SIGKILL:
            text = f"it was killed by SIGKILL, probably because memory ran out. {_MEMORY_KNOBS}"
    else:
        fields["exit_code"] = return_code
        text = f"it exited with code {return_code} and did not say why."
    if log_tail:
        fields["log_tail"] = log_tail
    return warning("WORKER_LOST", f"The job's process is gone: {text}", **fields)


def expired_note(owner: str) -> job_pb2.Note:
    """Return the remark about a runner that has not been heard of for longer than its lease."""
    return warning("WORKER_LOST", f"The runner {owner or '?'} fell silent for longer than its lease.", runner=owner)


def stopped(name: str, cause: str, note: job_pb2.Note | None = None) -> JobEnd:
    """Return how an attempt ends that was asked to stop: `cancel`, `pause` or `handover`."""
    if cause == "cancel":
        return JobEnd(CANCELLED, note=note)
    if cause == "pause":
        return JobEnd(PAUSED, pause=user_pause(name), note=note)
    return JobEnd(QUEUED, note=note)


def paused(pause: JobPaused) -> JobEnd:
    """Return how an attempt ends whose handler can't go on now."""
    info = job_pb2.PauseInfo(reason=pause.reason, message=pause.message)
    if pause.retry_time is not None:
        info.retry_time.FromDatetime(pause.retry_time)
    return JobEnd(PAUSED, pause=info)


def failed(error: BaseException, settings: CoreSettings) -> JobEnd:
    """Return how an attempt ends whose handler raised, with secrets taken out of what it says."""
    hide_folder(settings.data_dir, "$LORALINE_DATA_DIR")
    status = told_to_callers(failure(error)).to_status()
    status.message = redact(status.message, settings_secrets(settings))
    return JobEnd(FAILED, error=status)


def failure(error: BaseException) -> LoralineError:
    """Return what a handler raised as a typed error; what the platform does not know is JOB_CRASHED."""
    if isinstance(error, LoralineError):
        return error
    if isinstance(error, MemoryError):
        message = f"The job ran out of memory ({_last_frame(error)}). {_MEMORY_KNOBS}"
        return LoralineError(grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", message)
    if (full := _full_disk(error)) is not None:
        filename = getattr(full, "filename", None)
        where = f" at {filename}" if filename else ""
        message = f"The disk is full{where}. Free space, or move LORALINE_DATA_DIR, then resume the job."
        return LoralineError(grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", message)
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    text = f"The job crashed with {kind}: {str(error) or '(no message)'} ({_last_frame(error)})."
    metadata = {"exception": kind, "frame": _last_frame(error)}
    return LoralineError(grpc.StatusCode.INTERNAL, "JOB_CRASHED", text, metadata=metadata)


def _full_disk(error: BaseException) -> BaseException | None:
    """Return the error, or the one it was raised from or while handling, that says that a disk is full.

    safetensors and torch write files themselves and raise errors of their own, torch's without saying why.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in {errno.ENOSPC, errno.EDQUOT}:
            return seen
        if any(words in str(seen) for words in _FULL_DISK):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _last_frame(error: BaseException) -> str:
    """Return file name, line and function where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no frame"
    last = frames[-1]
    return f"{last.filename.rpartition('/')[2]}:{last.lineno} in {last.name}"
