"""How running work is shown: bars on a terminal, lines in a pipe, JSON lines for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from loraline.api.job.v1 import job_pb2
from loraline.client.cli.output import Output, clean, seconds_text, size_text
from loraline.client.cli.plaindata import as_data, enum_word
from loraline.client.pipeline.report import StageOutcome

FIGURES = ("loss", "eval_loss", "token_accuracy", "rows", "tokens_per_second", "kl")
QUARTERS = 4
ROUTINE = frozenset({"CHECKPOINT_SAVED"})
"""Reasons of notes that come again and again; `--format json` shows them."""


class View(Protocol):
    """An Observer of pipelines that is also a context: leaving it leaves the screen tidy."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...

    def started(self, stage: str, what: str) -> None:
        """Tell that a stage begins."""

    def sent(self, stage: str, done: int, total: int) -> None:
        """Tell how many bytes are sent or received."""

    def job_update(self, stage: str, update: job_pb2.WatchJobResponse) -> None:
        """Tell an event of a job."""

    def remark(self, stage: str, text: str) -> None:
        """Tell something worth knowing."""

    def finished(self, outcome: StageOutcome) -> None:
        """Tell that a stage is done."""


def view(output: Output) -> View:
    """Return the view that fits where the output goes."""
    if output.json:
        return JsonView(output)
    return TerminalView(output) if output.terminal and not output.quiet else PlainView(output)


def figures_text(progress: job_pb2.Progress, *, live: bool = True) -> str:
    """Return step, expected time and figures of a progress in a few words; no time for work that stands still."""
    said = clean(progress.message)
    parts = [said] if said else []
    steps = f"{progress.step}/{progress.total_steps}"
    if progress.total_steps and progress.unit != "byte" and steps not in said:
        parts.append(f"{progress.unit or 'step'} {steps}")
    if live and progress.eta.seconds > 0:
        parts.append(f"{_about(progress.eta.seconds)} left")
    figures = [name for name in FIGURES if name in progress.metrics and f"{name.replace('_', ' ')} " not in said]
    parts += [f"{name} {progress.metrics[name]:.4g}" for name in figures]
    return "  ".join([*parts, *_rate_and_cost(progress.metrics)])


def _about(seconds: int) -> str:
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _rate_and_cost(metrics: Mapping[str, float]) -> list[str]:
    """Return what rows come to; nothing for what is 0, such as the cost of a model of one's own."""
    rate, cost, expected = (metrics.get(name, 0.0) for name in ("rows_per_second", "cost_usd", "cost_usd_expected"))
    said = [f"{rate:.3g} rows/s"] if rate > 0 else []
    if cost > 0:
        said.append(f"{_dollars(cost)} of about {_dollars(expected)}" if expected > cost else _dollars(cost))
    return said


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 0.1 else f"${amount:.4f}"


def outcome_text(outcome: StageOutcome) -> str:
    """Return what a stage ended with."""
    made = outcome.artifact_text or outcome.detail
    time = outcome.how if outcome.how == "already done" else seconds_text(outcome.seconds)
    more = f"  ({outcome.how})" if outcome.how and outcome.how != "already done" else ""
    return f"{made}  {time}{more}".strip()


class _NoContext:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        pass


class JsonView(_NoContext):
    """Events as JSON lines."""

    def __init__(self, output: Output):
        self._output = output

    def started(self, stage: str, what: str) -> None:
        """Write that a stage begins."""
        self._write("started", stage, what=what)

    def sent(self, stage: str, done: int, total: int) -> None:
        """Write the end of a transfer only."""
        if done == total:
            self._write("sent", stage, bytes=total)

    def job_update(self, stage: str, update: job_pb2.WatchJobResponse) -> None:
        """Write the event."""
        self._write("event", stage, job=update.job.name, **as_data(update.event))

    def remark(self, stage: str, text: str) -> None:
        """Write the remark."""
        self._write("remark", stage, text=text)

    def finished(self, outcome: StageOutcome) -> None:
        """Write the outcome."""
        self._write("finished", outcome.stage, **outcome_data(outcome))

    def _write(self, kind: str, stage: str, **more: Any) -> None:
        self._output.data({"type": kind, "stage": stage} | more)


def outcome_data(outcome: StageOutcome) -> dict[str, Any]:
    """Return a stage's outcome as plain data."""
    entries: dict[str, Any] = {
        "how": outcome.how,
        "job": outcome.job,
        "artifact": outcome.artifact_text,
        "digest": outcome.artifact.digest if outcome.artifact is not None else "",
        "location": outcome.artifact.location if outcome.artifact is not None else "",
        "seconds": round(outcome.seconds, 3),
        "detail": outcome.detail,
        "result": as_data(outcome.result) if outcome.result is not None else None,
        "served": as_data(outcome.served) if outcome.served is not None else None,
    }
    return {name: value for name, value in entries.items() if value not in ("", None)}


class PlainView(_NoContext):
    """Lines of text: states, notes, artifacts, and each quarter of the way."""

    def __init__(self, output: Output):
        self._output = output
        self._quarter: dict[str, int] = {}

    def started(self, stage: str, what: str) -> None:
        """Write what the stage will do."""
        self._say(stage, what)

    def sent(self, stage: str, done: int, total: int) -> None:
        """Write the end of a transfer only."""
        if done == total:
            self._say(stage, f"{size_text(total)} transferred")

    def job_update(self, stage: str, update: job_pb2.WatchJobResponse) -> None:
        """Write the event when it is noteworthy."""
        event = update.event
        match event.WhichOneof("event"):
            case "state_change":
                if event.state_change.to != job_pb2.JOB_STATE_SUCCEEDED:  # `finished` says more
                    self._say(stage, enum_word(job_pb2.JobState.DESCRIPTOR, event.state_change.to).lower())
            case "progress":
                self._progress(stage, event.progress)
            case "note" if event.note.reason not in ROUTINE:
                self._say(stage, note_text(event.note))

    def _progress(self, stage: str, progress: job_pb2.Progress) -> None:
        quarter = int(progress.fraction * QUARTERS)
        if quarter > self._quarter.get(stage, 0):
            self._quarter[stage] = quarter
            self._say(stage, f"{progress.fraction:.0%}  {figures_text(progress)}".rstrip())

    def remark(self, stage: str, text: str) -> None:
        """Write the remark."""
        self._say(stage, text)

    def finished(self, outcome: StageOutcome) -> None:
        """Write what was made."""
        self._say(outcome.stage, f"done: {outcome_text(outcome)}")

    def _say(self, stage: str, text: str) -> None:
        self._output.say(f"{stage}: {text}" if stage else text)


def note_text(note: job_pb2.Note) -> str:
    """Return a job's note in a line."""
    grave = {job_pb2.SEVERITY_WARNING: "warning: ", job_pb2.SEVERITY_ERROR: "error: "}.get(note.severity, "")
    return grave + note.message


class TerminalView:
    """A bar for each running stage below the lines of the finished ones."""

    def __init__(self, output: Output):
        self._output = output
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            console=output.out,
        )
        self._live = Live(Group(self._progress), console=output.out, refresh_per_second=8, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the screen to somebody who asks a question."""
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def started(self, stage: str, what: str) -> None:
        """Show a bar that waits."""
        self._tasks[stage] = self._progress.add_task(stage or what, total=None, figures=what)

    def sent(self, stage: str, done: int, total: int) -> None:
        """Move the bar by bytes."""
        figures = f"{size_text(done)} of {size_text(total)}"
        self._progress.update(self._tasks[stage], completed=done, total=total or 1, figures=figures)

    def job_update(self, stage: str, update: job_pb2.WatchJobResponse) -> None:
        """Move the bar, or print a note above the bars."""
        event, task = update.event, self._tasks[stage]
        match event.WhichOneof("event"):
            case "state_change":
                self._progress.update(
                    task, figures=enum_word(job_pb2.JobState.DESCRIPTOR, event.state_change.to).lower()
                )
            case "progress":
                known = event.progress.fraction > 0
                figures = figures_text(event.progress).replace("[", "\\[")
                total = 1.0 if known else None
                self._progress.update(task, completed=event.progress.fraction, total=total, figures=figures)
            case "note" if event.note.reason not in ROUTINE:
                style = "dim" if event.note.severity in (0, job_pb2.SEVERITY_INFO) else "yellow"
                self._above("·", style, stage, note_text(event.note))

    def remark(self, stage: str, text: str) -> None:
        """Print the remark above the bars."""
        self._above("·", "dim", stage, text)

    def finished(self, outcome: StageOutcome) -> None:
        """Replace the bar by a line."""
        task = self._tasks.pop(outcome.stage, None)
        if task is not None:
            self._progress.remove_task(task)
        self._above("✓", "green", outcome.stage, outcome_text(outcome))

    def _above(self, mark: str, style: str, stage: str, text: str) -> None:
        line = Text.assemble((f"{mark} ", style), (f"{stage:<18}" if stage else "", "bold"), (clean(text), ""))
        if style == "dim":
            line.stylize("dim")
        self._output.out.print(line, soft_wrap=True)
