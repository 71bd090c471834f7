"""The demo against a platform in another process: what it shows, and that it fails when evidence fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.demo import check_style
from loraline.client.pipeline.report import AskedPrompt, PipelineReport, check_probes
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


def test_an_adapter_that_changes_nothing_is_no_evidence():
    probes = trainer_pb2.ProbeSummary(
        probes=8, max_abs_logprob_shift=0.0, mean_base_logprob=-5, mean_adapter_logprob=-5
    )
    assert not check_probes(probes).passed
