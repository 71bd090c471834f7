"""`loraline runs …`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.lossplot import tell_loss
from loraline.client.cli.output import Output, age_text
from loraline.client.cli.plaindata import enum_word
from loraline.client.refs import format_ref

_STYLES = {
    trainer_pb2.VERDICT_GOOD: "bold green",
    trainer_pb2.VERDICT_FAIR: "bold yellow",
    trainer_pb2.VERDICT_UNDERTRAINED: "bold yellow",
    trainer_pb2.VERDICT_OVERFIT: "bold yellow",
}

_PHASES = (
    (trainer_pb2.RUN_PHASE_BEFORE, "before: data and settings"),
    (trainer_pb2.RUN_PHASE_DURING, "during: the course of the loss"),
    (trainer_pb2.RUN_PHASE_AFTER, "after: what came out"),
    (trainer_pb2.RUN_PHASE_UNSPECIFIED, "besides"),
)


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Training runs: what they made, and whether they trained well.")
    app.add_typer(group, name="runs")
    group.command("list")(list_runs)
    group.command("show")(show)
    group.command("batch")(batch)
    group.command("diagnose")(diagnose)


def list_runs() -> None:
    """List the training runs, newest first."""
    output = invocation().output
    with invocation().client() as client:
        found = client.trainer.runs()
    if output.json:
        output.data(found)
        return
    rows = [
        [
            run.name,
            _state(run),
            str(run.checkpoints[0].step) if run.checkpoints else "",
            _made(run),
            age_text(run.update_time),
        ]
        for run in found
    ]
    output.table(["run", "state", "checkpoint", "made", "changed"], rows, empty="No run was started yet.")


def _made(run: trainer_pb2.Run) -> str:
    """Return the adapter and the model that the run made, such as `adapter/mareva:v2`; empty when there is none yet."""
    made = [run.adapter] if run.HasField("adapter") else []
    made += [run.model] if run.HasField("model") else []
    return ", ".join(map(format_ref, made))


def show(name: Annotated[str, typer.Argument(help="Name of the run.")]) -> None:
    """Show one run with its checkpoints."""
    output = invocation().output
    with invocation().client() as client:
        run = client.trainer.run(name)
    if output.json:
        output.data(run)
        return
    output.line(f"{run.name}  {_state(run)}  job {run.job}")
    if _made(run):
        output.line(f"made  {_made(run)}")
    rows = [
        [
            str(point.step),
            f"{point.epoch:.2f}",
            f"{point.loss:.3f}",
            f"{point.eval_loss:.3f}" if point.HasField("eval_loss") else "",
        ]
        for point in run.checkpoints
    ]
    output.table(["checkpoint", "epoch", "loss", "eval loss"], rows, empty="No checkpoint lies on the server.")


def batch(
    name: Annotated[str, typer.Argument(help="Name of the run.")],
    tokens: Annotated[bool, typer.Option("--tokens", help="A line for each token, with its id.")] = False,
) -> None:
    """Show the first batch as the model is shown it: tokens, text, and what carries loss.

    It is there as soon as the run trains. What carries loss stands between ⟦ and ⟧.

    Examples:

      loraline runs batch mareva
      loraline runs batch mareva --tokens
    """
    output = invocation().output
    with invocation().client() as client:
        rows = client.trainer.run(name).first_batch
    if output.json:
        output.data(list(rows))
        return
    if not rows:
        output.say(f"The run {name} has shown its model nothing yet. Follow it with `loraline jobs list`.")
    for number, row in enumerate(rows, start=1):
        cut = f", the first {len(row.token_ids)} shown" if row.length > len(row.token_ids) else ""
        output.say(f"row {number}: {row.length} tokens{cut}, {sum(row.trained)} carry loss", "bold cyan")
        if tokens:
            _tell_tokens(output, row)
        else:
            output.line(with_marks(row))
            output.line("")


def _tell_tokens(output: Output, row: trainer_pb2.BatchRow) -> None:
    lines = [
        [str(place), str(token), "loss" if trained else "", repr(text)[1:-1]]
        for place, (token, text, trained) in enumerate(zip(row.token_ids, row.tokens, row.trained, strict=True))
    ]
    output.table(["place", "id", "", "text"], lines, empty="No token.")


def with_marks(row: trainer_pb2.BatchRow) -> str:
    """Return a row's text with ⟦ and ⟧ around what carries loss."""
    parts, inside = [], False
    for text, trained in zip(row.tokens, row.trained, strict=True):
        if trained != inside:
            parts.append("⟦" if trained else "⟧")
            inside = trained
        parts.append(text)
    return "".join([*parts, "⟧"] if inside else parts)


def diagnose(
    name: Annotated[str, typer.Argument(help="Name of the run; leave it out with --file.")] = "",
    file: Annotated[
        Path | None,
        typer.Option(help="A trainer_state.json from anywhere, not a run.", exists=True, dir_okay=False),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the judgement as a page to this file.")] = None,
) -> None:
    """Judge a run by its loss curve: good, fair, undertrained, overfit, diverged, no signal or a bug in the data.

    Says why, with figures, and with which settings to run next.

    Examples:

      loraline runs diagnose mareva --html mareva.html
      loraline runs diagnose --file out/checkpoint-500/trainer_state.json
    """
    if bool(name) == bool(file):
        raise typer.BadParameter("Give the name of a run, or --file, not both.")
    output = invocation().output
    with invocation().client() as client:
        answer = client.trainer.diagnose_file(file.read_bytes()) if file else client.trainer.diagnose(name)
    if html:
        html.write_text(answer.html, encoding="utf-8")
    if output.json:
        answer.ClearField("html")
        output.data(answer)
        return
    _tell(output, answer)
    if html:
        output.say(f"page written to {html}")


def _tell(output: Output, answer: trainer_pb2.DiagnoseResponse) -> None:
    verdict = enum_word(trainer_pb2.Verdict.DESCRIPTOR, answer.verdict).replace("_", " ").lower()
    output.line(f"verdict: {verdict}", _STYLES.get(answer.verdict, "bold red"))
    tell_loss(output, answer.loss_curve)
    for phase, heading in _PHASES:
        reasons = [reason for reason in answer.reasons if reason.phase == phase]
        if reasons:
            output.say("")
            output.say(heading, "bold cyan")
        for reason in reasons:
            _tell_reason(output, reason)
    _tell_samples(output, answer.samples)
    if answer.config_patch.fields:
        output.say("")
        output.say("run next with these training_params", "bold cyan")
        for key, value in _flat(dict(answer.config_patch)):
            output.line(f"  {key}: {value}")
    if answer.HasField("base_model"):
        output.say("")
        output.line(f"run next on a larger base: {format_ref(answer.base_model)}", "bold cyan")


def _tell_reason(output: Output, reason: trainer_pb2.PlanCheck) -> None:
    grave = reason.severity == job_pb2.SEVERITY_ERROR
    word, style = ("ok", "green") if reason.passed else ("bad", "bold red") if grave else ("look", "yellow")
    output.line(f"  {word:<5} {reason.message}", style)
    if reason.remedy and not reason.passed:
        output.line(f"        {reason.remedy}")


def _tell_samples(output: Output, samples: Iterable[trainer_pb2.SampleAnswers]) -> None:
    """Show what base and adapter answer, one below the other: answers are too long for columns."""
    for sample in samples:
        output.say("")
        output.line(f"asked ({sample.origin.replace('_', ' ')}): {sample.prompt}", "bold")
        for of, text in (("base", sample.base), ("adapter", sample.adapter), ("row", sample.reference)):
            if text:
                output.line(f"  {of:<8} {text}")


def _flat(settings: dict) -> list[tuple[str, str]]:
    """Return the settings as pipeline files write them: LoRA's own with the prefix lora_."""
    flat = []
    for key, value in settings.items():
        if key == "lora":
            flat.extend((f"lora_{name}", _number(inner)) for name, inner in dict(value).items())
        else:
            flat.append((key, _number(value)))
    return sorted(flat)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _state(run: trainer_pb2.Run) -> str:
    return enum_word(job_pb2.JobState.DESCRIPTOR, run.state).lower()
