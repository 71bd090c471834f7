"""The demo against a platform in another process: what it shows, and that it fails when evidence fails."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraline.api.inference.v1 import inference_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client import demo as client_demo
from loraline.client.cli.app import App
from loraline.client.demo import check_style
from loraline.client.pipeline.report import AskedPrompt, PipelineReport, StageOutcome
from loraline.client.resources.inference import Answer


def demo(address, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "loraline.client.demo", *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**os.environ, "LORALINE_ADDRESS": address},
        timeout=60,
        check=False,
    )


def test_the_demo_shows_all_evidence(address, pipeline):
    done = demo(address, pipeline, "--merged")
    # The fake's merged model is a base to it and babbles: exactly that is what the demo must catch.
    assert done.returncode == 1
    assert "error: evidence failed: style, merged" in done.stderr
    assert "training loss by step" in done.stdout and "step     8  loss 0.875" in done.stdout
    for evidence in ("token receipt", "probes", "measured merge", "load proof", "style, tuned", "style, base"):
        assert any(line.split()[:1] == ["ok"] and evidence in line for line in done.stdout.splitlines()), evidence
    done = demo(address, pipeline)
    assert done.returncode == 0 and "every piece of evidence holds" in done.stdout


def test_the_demo_in_json(address, pipeline):
    done = demo(address, pipeline, "--format", "json")
    assert json.loads(done.stdout.splitlines()[-1])["passed"] is True


def answered(base: str, tuned: str) -> AskedPrompt:
    answers = {who: Answer(text, who, "STOP", 1, 1, 0.1) for who, text in (("base", base), ("tuned", tuned))}
    return AskedPrompt("seen", "hi", answers)


def test_style_is_judged_by_shares():
    good, bad = answered("x", "Hello, Little Sailor!"), answered("x", "hello")
    report = PipelineReport("m", answers=[good] * 7 + [bad] * 3, markers=("little sailor",))
    assert [check.passed for check in check_style(report)] == [True, True]
    report.answers = [good] * 6 + [bad] * 4
    assert [check.passed for check in check_style(report)] == [True, False]
    report.answers = [good] * 8 + [answered("little sailor", "little sailor")] * 2
    assert [check.passed for check in check_style(report)] == [False, True]


def proven() -> PipelineReport:
    """A run whose every piece of evidence holds."""
    train = trainer_pb2.TrainResult(
        receipt=trainer_pb2.ReceiptSummary(rows=40, tokens=900, trained_tokens=500, rows_teaching_eos=40),
        probes=trainer_pb2.ProbeSummary(
            probes=8, max_abs_logprob_shift=2.0, mean_base_logprob=-5.0, mean_adapter_logprob=-1.0
        ),
    )
    merge = merger_pb2.MergeResult(
        measurements=[
            merger_pb2.MergeMeasurement(
                subject="model", tokens=90, within_bound=True, max_abs_logprob_diff=0.01, base_to_adapter_diff=2.0
            )
        ]
    )
    served = inference_pb2.ServedModel(
        kind=inference_pb2.SERVED_KIND_ADAPTER,
        proof=inference_pb2.LoadProof(
            tokens=90,
            mean_abs_diff_from_trainer=0.001,
            bound=0.15,
            max_abs_diff_from_base=2.0,
            receipt_rows_matched=16,
        ),
    )
    outcomes = [
        StageOutcome("train", result=train),
        StageOutcome("merge", result=merge),
        StageOutcome("serve", served=served),
    ]
    answers = [answered("x", "Hello, little sailor!")] * 3
    owed = frozenset({"train", "merge", "serve", "ask"})
    return PipelineReport("m", outcomes, answers, ("little sailor",), expected=owed)


def spoil(stage: int, message: str, **values: object) -> Callable[[PipelineReport], None]:
    """Return what gives a message of a stage's result other figures."""

    def change(report: PipelineReport) -> None:
        outcome = report.outcomes[stage]
        target = getattr(outcome.result if outcome.result is not None else outcome.served, message)
        if message == "measurements":
            target = target[0]
        for name, value in values.items():
            setattr(target, name, value)

    return change


def nothing_measured(report: PipelineReport) -> None:
    assert isinstance(report.outcomes[1].result, merger_pb2.MergeResult)
    report.outcomes[1].result.ClearField("measurements")


def one_of_two_out_of_bound(report: PipelineReport) -> None:
    assert isinstance(report.outcomes[1].result, merger_pb2.MergeResult)
    rows = report.outcomes[1].result.measurements
    rows.add().CopyFrom(rows[0])
    rows[1].within_bound = False


def no_proof(report: PipelineReport) -> None:
    assert report.outcomes[2].served is not None
    report.outcomes[2].served.ClearField("proof")


def without(stage: int) -> Callable[[PipelineReport], None]:
    """Return what takes away a stage's result, as if the server had not sent it."""

    def change(report: PipelineReport) -> None:
        report.outcomes[stage].result = report.outcomes[stage].served = None

    return change


def no_answers(report: PipelineReport) -> None:
    report.answers = []


def other_answers(base: str, tuned: str) -> Callable[[PipelineReport], None]:
    def change(report: PipelineReport) -> None:
        report.answers = [answered(base, tuned)] * 3

    return change


SPOILED: dict[str, tuple[str, Callable[[PipelineReport], None]]] = {
    "no token carries loss": ("token receipt", spoil(0, "receipt", trained_tokens=0)),
    "a row is fully masked": ("token receipt", spoil(0, "receipt", fully_masked_rows=1)),
    "no row teaches the end": ("token receipt", spoil(0, "receipt", rows_teaching_eos=0)),
    "no probes": ("probes", spoil(0, "probes", probes=0)),
    "the adapter changes nothing": ("probes", spoil(0, "probes", max_abs_logprob_shift=0.05)),
    "away from the taught answers": ("probes", spoil(0, "probes", mean_adapter_logprob=-6.0)),
    "as far as the base": ("probes", spoil(0, "probes", mean_adapter_logprob=-5.0)),
    "nothing was measured": ("measured merge", nothing_measured),
    "out of its bound": ("measured merge", spoil(1, "measurements", within_bound=False)),
    "one export out of its bound": ("measured merge", one_of_two_out_of_bound),
    "measured on no token": ("measured merge", spoil(1, "measurements", tokens=0)),
    "base and adapter alike": ("measured merge", spoil(1, "measurements", base_to_adapter_diff=0.01)),
    "no proof at load": ("load proof", no_proof),
    "proof over no token": ("load proof", spoil(2, "proof", tokens=0)),
    "not what was trained": ("load proof", spoil(2, "proof", mean_abs_diff_from_trainer=0.2)),
    "what answers is the base": ("load proof", spoil(2, "proof", max_abs_diff_from_base=0.05)),
    "no receipt row renders": ("load proof", spoil(2, "proof", receipt_rows_matched=0)),
    "training gave no result": ("token receipt, probes", without(0)),
    "the merge gave no result": ("measured merge", without(1)),
    "nothing is served": ("load proof", without(2)),
    "nothing was answered": ("style", no_answers),
    "the tuned model has no style": ("style, tuned", other_answers("x", "y")),
    "the base has the style": ("style, base", other_answers("little sailor", "little sailor")),
}


def told_by_the_demo(monkeypatch: pytest.MonkeyPatch, pipeline: Path, report: PipelineReport, *arguments: str) -> Any:
    monkeypatch.setattr(client_demo, "execute", lambda called, spec: report)
    app = App(help="The demo.", add_completion=False)
    app.command("demo")(client_demo.demo)
    # A context of its own, as a process would have: what the options said is kept in a context variable.
    return contextvars.Context().run(CliRunner().invoke, app, ["demo", str(pipeline), "--no-merged", *arguments])


def test_the_demo_passes_when_all_evidence_holds(monkeypatch, pipeline):
    done = told_by_the_demo(monkeypatch, pipeline, proven())
    assert done.exit_code == 0, done.output
    assert "every piece of evidence holds" in done.output


@pytest.mark.parametrize("case", SPOILED)
def test_each_evidence_that_fails_fails_the_demo_and_is_named(monkeypatch, pipeline, case):
    name, change = SPOILED[case]
    report = proven()
    change(report)
    failed = [check.name for check in report.checks() + check_style(report) if not check.passed]
    assert ", ".join(failed) == name
    done = told_by_the_demo(monkeypatch, pipeline, report)
    assert done.exit_code == 1
    assert f"error: evidence failed: {name}\n" in done.output
    assert "every piece of evidence holds" not in done.output
    as_json = json.loads(told_by_the_demo(monkeypatch, pipeline, report, "--format", "json").output.splitlines()[-1])
    assert as_json["passed"] is False
    assert ", ".join(entry["name"] for entry in as_json["evidence"] if not entry["passed"]) == name
