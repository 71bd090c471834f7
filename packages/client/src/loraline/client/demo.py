"""The demo: the example persona from raw text to served answers, with every piece of evidence checked.

Run it with `make demo`, or against a running server with `python -m loraline.client.demo --address HOST:PORT`.
It ends with exit code 0 only when all evidence holds; otherwise it names what failed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.inference.v1 import inference_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.aio import AsyncLoraline
from loraline.client.cli.app import App, Invocation, invocation
from loraline.client.cli.commands.pipelines import execute
from loraline.client.cli.failures import FAILED, CommandFailed
from loraline.client.cli.lossplot import tell_loss
from loraline.client.cli.output import Output
from loraline.client.cli.progress import View, view
from loraline.client.cli.summary import report_data, tell_answers, tell_checks, tell_places, tell_stages
from loraline.client.pipeline import serving
from loraline.client.pipeline.reading import read_pipeline
from loraline.client.pipeline.report import AskedPrompt, Check, PipelineReport, marked_share, missing
from loraline.client.pipeline.spec import PipelineSpec

PIPELINE = Path("examples/persona/pipeline.yaml")
LEAST_TUNED, MOST_BASE = 0.7, 0.1
"""Shares of answers that carry a mark of the style: at least so many tuned ones, at most so many of the base."""


def demo(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline file.")] = PIPELINE,
    merged: Annotated[
        bool | None, typer.Option(help="Ask the merged model too; by default where loading takes seconds.")
    ] = None,
) -> None:
    """Run the example persona and show that it worked."""
    called = invocation()
    spec = read_pipeline(pipeline)
    report = execute(called, spec)
    if _shall_ask_merged(called, spec, merged):
        answers = _ask_merged(called, spec, report)
        report.answers = [
            AskedPrompt(entry.group, entry.prompt, entry.answers | other.answers)
            for entry, other in zip(report.answers, answers, strict=True)
        ]
    checks = report.checks() + check_style(report)
    _tell(called.output, spec, report, checks)
    if not all(check.passed for check in checks):
        raise CommandFailed(FAILED)


def _shall_ask_merged(called: Invocation, spec: PipelineSpec, wanted: bool | None) -> bool:
    """Whether to ask the merged model: when wanted, or when nothing is said and the engine loads models at once."""
    if wanted is False or spec.ask is None or spec.serve is None or not spec.serve.adapter or spec.merge is None:
        return False
    with called.client() as client:
        return bool(wanted) or client.inference.capabilities().engine == "transformers"


def check_style(report: PipelineReport) -> list[Check]:
    """Return whether the tuned answers carry the marks of the style, and the base's do not."""
    if not report.markers or not report.answers:
        return [missing("style")] if "ask" in report.expected else []
    checks = []
    for who in report.answers[0].answers:
        marked, count = marked_share(report.answers, who, report.markers)
        share = marked / count
        passed = share <= MOST_BASE if who == "base" else share >= LEAST_TUNED
        bound = f"at most {MOST_BASE:.0%}" if who == "base" else f"at least {LEAST_TUNED:.0%}"
        figures = f"{marked} of {count} answers carry a mark of her style ({bound} wanted)"
        checks.append(Check(f"style, {who}", passed, figures))
    return checks


def _ask_merged(called: Invocation, spec: PipelineSpec, report: PipelineReport) -> list[AskedPrompt]:
    """Serve the merged model for a moment, ask it the same questions, and put the adapter back into service."""
    assert spec.ask is not None and spec.serve is not None  # noqa: S101 - the caller has looked
    ask, alias = spec.ask, spec.serve.alias
    made = {outcome.stage: outcome.artifact for outcome in report.outcomes}
    base = spec.base_model.existing or trainer_pb2.BaseModel()
    if made["base_model"] is not None:
        base = trainer_pb2.BaseModel(artifact=made["base_model"].ref)

    async def work(shown: View) -> list[AskedPrompt]:
        async with called.async_client() as client:
            try:
                model = trainer_pb2.BaseModel(artifact=_ref(made["merge"]))
                await client.inference.load_model(model)
                return await serving.ask(client, ask, {"merged": ""})
            finally:
                await _restore(client, base, _ref(made["train"]), alias, shown)

    with view(called.output) as shown:
        shown.started("serve", "asking the merged model, then the adapter is put back into service")
        return asyncio.run(work(shown))


async def _restore(
    client: AsyncLoraline, base: trainer_pb2.BaseModel, adapter: artifact_pb2.ArtifactRef, alias: str, shown: View
) -> inference_pb2.ServedModel | None:
    outcome = await serving.serve(client, base, adapter, alias, shown)
    return outcome.served


def _ref(artifact: artifact_pb2.Artifact | None) -> artifact_pb2.ArtifactRef:
    assert artifact is not None  # noqa: S101 - these stages make one
    return artifact.ref


def _tell(output: Output, spec: PipelineSpec, report: PipelineReport, checks: list[Check]) -> None:
    failed = [check.name for check in checks if not check.passed]
    if output.json:
        output.data(report_data(report, checks) | {"passed": not failed})
        return
    tell_answers(output, report.answers)
    train: trainer_pb2.TrainResult | None = report.result(trainer_pb2.TrainResult)
    if train is not None:
        tell_loss(output, train.loss_curve)
    tell_stages(output, report)
    tell_checks(output, checks)
    tell_places(output, report)
    output.say("")
    if failed:
        output.err.print(f"error: evidence failed: {', '.join(failed)}", style="bold red", soft_wrap=True)
        return
    output.say("every piece of evidence holds", "bold green")
    alias = spec.serve.alias if spec.serve is not None else "production"
    output.say("go on:  loraline up")
    output.say(f"        loraline chat --model {spec.name}@{alias} --compare base")


def main() -> None:
    """Run the demo as a command."""
    app = App(help="The demo.", add_completion=False)
    app.command("demo")(demo)
    try:
        app(args=["demo", *sys.argv[1:]])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
