"""`loraline run`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client import tracing
from loraline.client.cli.app import App, Invocation, invocation
from loraline.client.cli.commands.jobs import next_for
from loraline.client.cli.existing import ExistingRun, asker, asks
from loraline.client.cli.failures import FAILED, INTERRUPTED, CommandFailed, exit_code, tell
from loraline.client.cli.output import Output
from loraline.client.cli.progress import View, view
from loraline.client.cli.summary import report_data, tell_answers, tell_checks, tell_places, tell_stages
from loraline.client.errors import JobNotSuccessful
from loraline.client.pipeline.plan import plan
from loraline.client.pipeline.reading import read_pipeline
from loraline.client.pipeline.report import PipelineReport
from loraline.client.pipeline.run import ExistingRunRule, PipelineRun, StageFailed
from loraline.client.pipeline.spec import PipelineSpec


def register(app: App) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="The pipeline file.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and every request it would make; ask no server.")
    ] = False,
    existing_run: Annotated[
        ExistingRun | None,
        typer.Option(
            help="When training starts anew under a name that has a run: fail, overwrite it, back it up, or continue "
            "it. Default: what the file says, else a question on a terminal, else backup."
        ),
    ] = None,
) -> None:
    """Run a pipeline file: data, base model, training, merge, serving, questions.

    Run it again at any time: finished stages are taken as they are, a running job is followed, a failed or
    cancelled one goes on from its last state. Only what changed in the file, or in its inputs, is done anew.
    Ctrl-C leaves the jobs running.

    Examples:

      loraline run examples/persona/pipeline.yaml
      loraline run pipeline.yaml --dry-run
      loraline run pipeline.yaml --existing-run continue    after raising the epochs in the file
      loraline run pipeline.yaml --format json | tail -1
    """
    spec = read_pipeline(pipeline)
    called = invocation()
    if dry_run:
        # Here, for every other command starts sooner without the validator.
        from loraline.client.pipeline.rehearsal import rehearse

        count = asyncio.run(rehearse(spec))
        _tell_plan(called.output, spec, count)
        return
    report = execute(called, spec, existing_run)
    checks = report.checks()
    output = called.output
    if output.json:
        output.data(report_data(report, checks))
    else:
        tell_answers(output, report.answers)
        tell_stages(output, report)
        tell_checks(output, checks)
        tell_places(output, report)
        _tell_next(output, spec)
    if not all(check.passed for check in checks):
        raise CommandFailed(FAILED)


def execute(called: Invocation, spec: PipelineSpec, existing: ExistingRun | None = None) -> PipelineReport:
    """Run a pipeline and show it; CommandFailed after the failure of a stage was told, or after Ctrl-C.

    `existing` says what becomes of an earlier run of its name; None asks on a terminal and keeps it aside elsewhere.
    """
    output = called.output
    active: list[PipelineRun] = []

    async def work(shown: View) -> PipelineReport:
        async with called.async_client() as client:
            told = existing.policy if existing is not None else trainer_pb2.EXISTING_RUN_POLICY_UNSPECIFIED
            rule = ExistingRunRule(told, asker(output, shown) if asks(output) else None)
            active.append(PipelineRun(client, spec, shown, rule))
            with tracing.span(f"pipeline {spec.name}", pipeline=spec.name):
                return await active[0].run()

    try:
        with tracing.recording() as problem, view(output) as shown:
            if problem:
                output.err.print(f"note: {problem}", soft_wrap=True, markup=False)
            return asyncio.run(work(shown))
    except StageFailed as failure:
        if os.environ.get("LORALINE_DEBUG") == "1":
            raise
        _tell_failure(output, spec, failure)
        raise CommandFailed(exit_code(failure.error)) from None
    except KeyboardInterrupt:
        _tell_detached(output, spec, active[0].live_jobs if active else {})
        raise CommandFailed(INTERRUPTED) from None


def _tell_plan(output: Output, spec: PipelineSpec, requests: int) -> None:
    stages = plan(spec)
    if output.json:
        output.data([{"stage": stage.name, "what": stage.what, "needs": list(stage.needs)} for stage in stages])
        return
    output.table(["stage", "does", "after"], [[stage.name, stage.what, ", ".join(stage.needs)] for stage in stages])
    output.say(f"all {requests} requests keep the rules of the API; no server was asked")


def _tell_failure(output: Output, spec: PipelineSpec, failure: StageFailed) -> None:
    error = failure.error
    then = f"loraline run {spec.file}   (goes on where it stopped)"
    if isinstance(error, JobNotSuccessful):
        then = f"{next_for(error.job)}, or once more: loraline run {spec.file}"
    siblings = {
        stage: f"{job} goes on; follow it: loraline jobs watch {job}; stop it: loraline jobs cancel {job}"
        for stage, job in failure.running.items()
    }
    siblings |= {stage: f"failed too: {other.message}" for stage, other in failure.also.items()}
    where = f"stage {failure.stage} of {spec.file}"
    tell(output, error, where=where, then="" if error.unreachable else then, siblings=siblings)


def _tell_detached(output: Output, spec: PipelineSpec, live: dict[str, str]) -> None:
    print_line = output.err.print
    print_line(f"\nDetached. Take it up again: loraline run {spec.file}", soft_wrap=True)
    for stage, job in live.items():
        line = f"  {stage} goes on: loraline jobs watch {job}   stop it: loraline jobs cancel {job}"
        print_line(line, soft_wrap=True)


def _tell_next(output: Output, spec: PipelineSpec) -> None:
    output.say("")
    if spec.serve is not None and spec.serve.adapter:
        output.say(f"talk to it: loraline chat --model {spec.name}@{spec.serve.alias}")
    elif spec.serve is not None:
        output.say("talk to it: loraline chat")
