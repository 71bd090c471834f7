"""`loraline jobs …`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from loraline.api.job.v1 import job_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.failures import FAILED, CommandFailed, tell
from loraline.client.cli.output import Output, age_text
from loraline.client.cli.plaindata import as_data, enum_word
from loraline.client.cli.progress import figures_text, view
from loraline.client.errors import from_status
from loraline.client.pipeline.report import StageOutcome
from loraline.client.refs import format_ref
from loraline.client.resources.jobs import ENDED, job_failure
from loraline.client.sync import Loraline

Name = Annotated[str, typer.Argument(help="Name of the job, as `loraline jobs list` shows it.")]


class State(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Look at long work, follow it, and steer it.")
    app.add_typer(group, name="jobs")
    group.command("list")(list_jobs)
    group.command("get")(get)
    group.command("watch")(watch)
    for name, text in _STEERING:
        group.command(name, help=text)(_steer(name))
    group.command("delete")(delete)


_STEERING = (
    ("cancel", "Stop a job for good. `loraline jobs resume` can take it up again."),
    ("pause", "Stop a job with its progress kept."),
    ("resume", "Let a paused, failed or cancelled job go on from its last state."),
)


def list_jobs(
    kind: Annotated[str, typer.Option(help="Only kinds that begin so: `trainer.`, `datagen.convert`.")] = "",
    state: Annotated[list[State] | None, typer.Option(help="Only these states; give it several times.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only jobs with this label: `pipeline=mareva`.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many, newest first; 0 for all.")] = 20,
) -> None:
    """List jobs, newest first.

    Examples:

      loraline jobs list --state running
      loraline jobs list --kind trainer. --format json
      loraline jobs list --label pipeline=mareva
    """
    output = invocation().output
    labels = dict(_label(text) for text in label or [])
    states = [job_pb2.JobState.Value(f"JOB_STATE_{entry.name}") for entry in state or []]
    with invocation().client() as client:
        jobs = client.jobs.list(kind_prefix=kind, states=states, labels=labels, limit=limit)
    if output.json:
        output.data(jobs)
        return
    rows = [
        [
            job.name,
            state_word(job),
            f"{job.progress.fraction:.0%}" if _runs(job) else "",
            age_text(job.create_time),
            ", ".join(format_ref(ref) for ref in job.outputs) or figures_text(job.progress, live=_runs(job)),
        ]
        for job in jobs
    ]
    output.table(["name", "state", "done", "created", "outputs"], rows, empty="No jobs. `loraline run` starts some.")


def _runs(job: job_pb2.Job) -> bool:
    return job.state == job_pb2.JOB_STATE_RUNNING


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is no label; write NAME=VALUE", param_hint="--label")
    return name, value


def state_word(job: job_pb2.Job) -> str:
    """Return where a job stands, and what it was asked."""
    word = enum_word(job_pb2.JobState.DESCRIPTOR, job.state)
    return f"{word} ({job.requested_stop} asked)" if job.requested_stop else word


def get(name: Name) -> None:
    """Show one job with its inputs, outputs and, where there is one, its error."""
    with invocation().client() as client:
        job = client.jobs.get(name)
    show(invocation().output, job)


def show(output: Output, job: job_pb2.Job) -> None:
    """Write one job."""
    if output.json:
        output.data(job)
        return
    result = as_data(job.result) if job.HasField("result") else {}
    plain = {
        key: value
        for key, value in result.items()
        if value != "" and isinstance(value, int | float | str) and key != "type"
    }
    output.pairs(
        [
            ("name", job.name),
            ("kind", job.kind),
            ("state", state_word(job)),
            ("progress", f"{job.progress.fraction:.0%}  {figures_text(job.progress, live=_runs(job))}".strip()),
            ("created", age_text(job.create_time)),
            ("attempt", str(job.attempt)),
            ("inputs", "\n".join(format_ref(ref) for ref in job.inputs)),
            ("outputs", "\n".join(format_ref(ref) for ref in job.outputs)),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))),
            ("pause", f"{job.pause.reason}: {job.pause.message}" if job.HasField("pause") else ""),
            ("result", "\n".join(f"{key} {_short(value)}" for key, value in plain.items())),
        ]
    )
    if job.HasField("error"):
        tell(output, from_status(job.error), then=f"after mending the cause: loraline jobs resume {job.name}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def watch(
    name: Name,
    after: Annotated[int, typer.Option(min=0, help="Only events after this sequence number.")] = 0,
) -> None:
    """Follow a job to its end; exit code 1 unless it succeeds. Ctrl-C leaves it running."""
    with invocation().client() as client:
        follow(client, invocation().output, name, after)


def follow(client: Loraline, output: Output, name: str, after: int = 0) -> job_pb2.Job:
    """Show a job until it has ended or is paused; CommandFailed unless it succeeded."""
    try:
        with view(output) as shown:
            shown.started(name, name)
            job = client.jobs.wait(name, on_update=lambda update: shown.job_update(name, update), after_sequence=after)
            if job.state == job_pb2.JOB_STATE_SUCCEEDED:
                shown.finished(_outcome(client, job))
    except KeyboardInterrupt:
        output.err.print(f"\n{name} goes on. Follow it: loraline jobs watch {name}", soft_wrap=True)
        output.err.print(f"Stop it: loraline jobs cancel {name}", soft_wrap=True)
        raise CommandFailed(130) from None
    if job.state != job_pb2.JOB_STATE_SUCCEEDED:
        tell(output, job_failure(job), where=f"job {name}", then=next_for(job))
        raise CommandFailed(FAILED)
    return job


def next_for(job: job_pb2.Job) -> str:
    """Return the command that goes on with a job that did not succeed."""
    if job.state == job_pb2.JOB_STATE_PAUSED:
        return f"loraline jobs resume {job.name}"
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        return f"to take it up again: loraline jobs resume {job.name}"
    return f"after mending the cause: loraline jobs resume {job.name}"


def _outcome(client: Loraline, job: job_pb2.Job) -> StageOutcome:
    outcome = StageOutcome(job.name, job=job.name)
    if job.HasField("start_time") and job.HasField("end_time"):
        outcome.seconds = (job.end_time.ToNanoseconds() - job.start_time.ToNanoseconds()) / 1e9
    if job.outputs:
        outcome.artifact = client.artifacts.show(job.outputs[0])
    return outcome


def _steer(action: str) -> Callable[..., None]:
    def steer(name: Name) -> None:
        with invocation().client() as client:
            before = client.jobs.get(name)
            job = getattr(client.jobs, action)(name)
        output = invocation().output
        if output.json:
            output.data(job)
        else:
            output.say(f"{name}: {_what_happened(action, before, job)}")

    return steer


def _what_happened(action: str, before: job_pb2.Job, job: job_pb2.Job) -> str:
    """Return where the job stands after a wish, and what to do next where it is not what was wished."""
    resume, state = f"loraline jobs resume {job.name}", enum_word(job_pb2.JobState.DESCRIPTOR, job.state)
    if action == "resume":
        return f"queued again; follow it: loraline jobs watch {job.name}"
    if before.state in ENDED:
        again = "" if job.state == job_pb2.JOB_STATE_SUCCEEDED else f"; to take it up again: {resume}"
        return f"had ended before and is still {state}; there was nothing to {action}{again}"
    if action == "pause" and job.requested_stop == "cancel":
        return f"is {state} and was asked to cancel before, which stays; when it is cancelled: {resume}"
    if job.requested_stop:
        return f"asked to {action}; it is {state} until it has saved its state: loraline jobs watch {job.name}"
    if before.state == job.state:
        return f"is {state} already; to let it go on: {resume}"
    return f"{state}; to let it go on: {resume}"


def delete(name: Name) -> None:
    """Delete the record of an ended job; its artifacts stay."""
    with invocation().client() as client:
        client.jobs.delete(name)
    output = invocation().output
    if output.json:
        output.data({"deleted": name})
    else:
        output.say(f"{name}: deleted")
