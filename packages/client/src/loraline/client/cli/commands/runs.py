"""`loraline runs …`."""

from __future__ import annotations

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


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Training runs: what they made, and whether they trained well.")
    app.add_typer(group, name="runs")
    group.command("list")(list_runs)
    group.command("show")(show)
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
    output.say("")
    for reason in answer.reasons:
        grave = reason.severity == job_pb2.SEVERITY_ERROR
        word, style = ("ok", "green") if reason.passed else ("bad", "bold red") if grave else ("look", "yellow")
        output.line(f"  {word:<5} {reason.message}", style)
        if reason.remedy and not reason.passed:
            output.line(f"        {reason.remedy}")
    if answer.config_patch.fields:
        output.say("")
        output.say("run next with these training_params", "bold cyan")
        for key, value in _flat(dict(answer.config_patch)):
            output.line(f"  {key}: {value}")


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
