"""The process that does one job: `python -m loraline.core.jobs.child`, started by a runner, told by standard input.

Until the group is guarded only the standard library is imported: guarding forks, and forking wants a single thread.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from loraline.core.jobs.guardian import guard_group
from loraline.core.jobs.loading import StopSignal
from loraline.core.jobs.payload import ChildPayload

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from loraline.core.config import CoreSettings
    from loraline.core.jobs.context import JobContext
    from loraline.core.jobs.model import JobEnd
    from loraline.core.jobs.telemetry import TelemetryWriter

EXIT_LEASE_LOST = 75


def main() -> int:
    """Run the job that the payload on standard input names and return the exit code."""
    payload = ChildPayload.from_line(_read_line())
    guard_group(payload.runner_pid)
    stop = StopSignal()
    signal.signal(signal.SIGTERM, stop.handler())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _run(payload, stop)


def _read_line() -> bytes:
    content = b""
    while not content.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            sys.exit("The runner went before it said what to do.")
        content += piece
    return content


def _run(payload: ChildPayload, stop: StopSignal) -> int:
    import logging

    from loraline.core import tracing
    from loraline.core.config import CoreSettings
    from loraline.core.db.database import Database
    from loraline.core.errors import LoralineError
    from loraline.core.jobs.endings import failed
    from loraline.core.jobs.model import QUEUED, SUCCEEDED, LeaseLost
    from loraline.core.jobs.patience import patiently
    from loraline.core.jobs.sql_table import open_table
    from loraline.core.jobs.telemetry import TelemetryWriter
    from loraline.core.logging import configure_job, mask

    log = logging.getLogger("loraline.job")
    settings = CoreSettings(**payload.settings)
    telemetry = TelemetryWriter(payload.telemetry_fd) if payload.telemetry_fd >= 0 else None
    configure_job(settings.log_level, telemetry.remark if telemetry is not None else lambda _: None)
    tracing.configure(f"loraline-{payload.kind.partition('.')[0]}")
    database = Database(settings.database_url)
    table = open_table(database)
    try:
        job = patiently(lambda: table.get(payload.job))
        try:
            context = _context(payload, settings, database, job.progress, stop, telemetry)
        except LoralineError as problem:  # such as a store that can't be opened
            end = failed(problem, settings)
            log.error(mask(problem.message), extra={"reason": problem.reason})
            if telemetry is not None:
                telemetry.flush()
            patiently(lambda: table.finish(payload.job, payload.epoch, end))
            return 0
        facts = {"loraline.job": payload.job, "loraline.attempt": payload.attempt}
        with tracing.span(payload.kind, parent=payload.trace, attributes=facts) as span:
            end = _do(context, payload, job.spec)
            if end.error is not None:
                span.fail(mask(end.error.message))
                log.error(end.error.message, extra={"reason": LoralineError.from_status(end.error).reason})
        context.tell_figures()
        progress = context.last_progress(done=end.state == SUCCEEDED)
        if end.state == QUEUED:
            if progress is not None:
                patiently(lambda: table.progress(payload.job, payload.epoch, progress))
            patiently(lambda: table.release(payload.job, payload.epoch))
        else:
            patiently(lambda: table.finish(payload.job, payload.epoch, end, progress))
    except LeaseLost as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_LEASE_LOST
    finally:
        tracing.flush()
        database.close()
    return 0


def _context(
    payload: ChildPayload,
    settings: CoreSettings,
    database: Any,
    progress: Any,
    stop: StopSignal,
    telemetry: TelemetryWriter | None,
) -> JobContext:
    from loraline.core.artifacts.library import ArtifactLibrary
    from loraline.core.jobs.context import JobContext
    from loraline.core.jobs.sql_table import open_table
    from loraline.core.jobs.workdir import job_folder

    return JobContext(
        job=payload.job,
        kind=payload.kind,
        attempt=payload.attempt,
        epoch=payload.epoch,
        settings=settings,
        library=ArtifactLibrary.open(settings, database),
        database=database,
        table=open_table(database),
        workdir=job_folder(settings.data_dir, payload.job),
        telemetry=telemetry,
        stop=stop,
        last_progress=progress,
    )


def _do(context: JobContext, payload: ChildPayload, spec: Any) -> JobEnd:
    """Call the handler and say how it ended."""
    import traceback

    from loraline.core.jobs import endings
    from loraline.core.jobs.handlers import JobPaused, StopRequested
    from loraline.core.jobs.model import SUCCEEDED, JobEnd, LeaseLost

    try:
        context.begin()
        with context.loading(tell=False):
            request = _load(payload.request_type)()
            entry = _load(payload.entry)
        spec.Unpack(request)
        result = entry(context, request)
        return JobEnd(SUCCEEDED, result=_packed(result))
    except LeaseLost:
        raise
    except StopRequested as stop:
        return endings.stopped(payload.job, stop.cause)
    except JobPaused as pause:
        return endings.paused(pause)
    except BaseException as error:  # SystemExit of a library too: nothing may end a job without a word
        traceback.print_exc()
        return endings.failed(error, context.settings)


def _load(path: str) -> Any:
    """Return what `package.module:Name.Inner` names."""
    import importlib

    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _packed(result: Message | None) -> Message | None:
    from google.protobuf import any_pb2

    if result is None:
        return None
    packed = any_pb2.Any()
    packed.Pack(result, deterministic=True)
    return packed


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that a library left behind must not keep a finished job's process alive.
    os._exit(code)
