"""What becomes of a run that exists already: asked on a terminal, said by `--existing-run` otherwise."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.cli.output import Output
from loraline.client.cli.plaindata import enum_word
from loraline.client.cli.progress import TerminalView, View
from loraline.client.refs import format_ref

Policy = trainer_pb2.ExistingRunPolicy.ValueType


class ExistingRun(StrEnum):
    """The choices, as people write them."""

    FAIL = "fail"
    OVERWRITE = "overwrite"
    BACKUP = "backup"
    CONTINUE = "continue"

    @property
    def policy(self) -> Policy:
        """The choice as the contract names it."""
        return _POLICIES[self]


_POLICIES: dict[ExistingRun, Policy] = {
    ExistingRun.FAIL: trainer_pb2.EXISTING_RUN_POLICY_FAIL,
    ExistingRun.OVERWRITE: trainer_pb2.EXISTING_RUN_POLICY_OVERWRITE,
    ExistingRun.BACKUP: trainer_pb2.EXISTING_RUN_POLICY_BACKUP_AND_RESTART,
    ExistingRun.CONTINUE: trainer_pb2.EXISTING_RUN_POLICY_CONTINUE,
}
_CHOICES = (ExistingRun.CONTINUE, ExistingRun.BACKUP, ExistingRun.OVERWRITE, ExistingRun.FAIL)


def asks(output: Output) -> bool:
    """Whether somebody is there to answer: both ends are a terminal and no JSON was asked for."""
    return output.terminal and not output.quiet and sys.stdin.isatty()


def asker(output: Output, shown: View) -> Callable[[trainer_pb2.Run], Awaitable[Policy]]:
    """Return the question for a pipeline to ask; it holds back what the view draws meanwhile."""

    async def ask_about(run: trainer_pb2.Run) -> Policy:
        with shown.paused() if isinstance(shown, TerminalView) else nullcontext():
            return ask(output, run).policy

    return ask_about


def ask(output: Output, run: trainer_pb2.Run) -> ExistingRun:
    """Ask which of the four it shall be; Enter, Ctrl-C and Ctrl-D mean FAIL, which changes nothing."""
    goes_on = bool(run.checkpoints)
    output.line(f"The run {run.name} exists: {describe(run)}.", "bold")
    for number, choice in enumerate(_CHOICES, start=1):
        output.line(
            f"  {number}  {choice.value:<10} {_meaning(choice, run)}", "" if _offered(choice, goes_on) else "dim"
        )
    with _interruptible():
        while True:
            try:
                output.out.print("Which? (1-4 or the word; Enter: fail) ", end="", markup=False, highlight=False)
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                line = ""
            answer = line.strip().lower()
            if not answer:
                return ExistingRun.FAIL
            chosen = _CHOICES[int(answer) - 1] if answer in ("1", "2", "3", "4") else _by_word(answer)
            if chosen is not None and _offered(chosen, goes_on):
                return chosen
            why = "there is no checkpoint to continue from" if chosen is not None else f"{answer!r} is none of them"
            output.line(f"  {why}", "yellow")


def describe(run: trainer_pb2.Run) -> str:
    """Return state, adapter and last checkpoint of a run in a line."""
    parts = [enum_word(job_pb2.JobState.DESCRIPTOR, run.state).lower()]
    if run.HasField("adapter"):
        parts.append(format_ref(run.adapter))
    if run.checkpoints:
        last = run.checkpoints[0]
        parts.append(f"last checkpoint at step {last.step} (epoch {last.epoch:.2f}, loss {last.loss:.3f})")
    return ", ".join(parts)


def _meaning(choice: ExistingRun, run: trainer_pb2.Run) -> str:
    if choice is ExistingRun.CONTINUE:
        if not run.checkpoints:
            return "not possible: it has no checkpoint"
        return f"go on from step {run.checkpoints[0].step}; epochs count from the run's beginning"
    return {
        ExistingRun.BACKUP: "keep its checkpoints, start anew; the adapter becomes the next version",
        ExistingRun.OVERWRITE: "delete its checkpoints, start anew; published adapters stay",
        ExistingRun.FAIL: "change nothing and stop here",
    }[choice]


def _by_word(answer: str) -> ExistingRun | None:
    found = [choice for choice in _CHOICES if choice.value.startswith(answer)]
    return found[0] if len(found) == 1 else None


def _offered(choice: ExistingRun, goes_on: bool) -> bool:
    return goes_on or choice is not ExistingRun.CONTINUE


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the reading of a line: the event loop's own handler would only note it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
