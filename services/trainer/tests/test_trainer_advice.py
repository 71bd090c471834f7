"""Advice that runs: what Diagnose says to run next is run, and does what it was for."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import json_format

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.diagnosis.history import from_curve
from loraline.trainer.diagnosis.sign import Facts
from loraline.trainer.diagnosis.subject import Subject, diagnose
from loraline.trainer.engines import training
from loraline.trainer.results import loss_curve
from loraline.trainer.spec import resolve, training_spec
from loraline.trainer.testing_runs import Watcher, inputs

pytestmark = pytest.mark.slow


def trained(base: Path, rows: Path, parameters: pb.TrainingParameters, folder: Path) -> pb.DiagnoseResponse:
    """Train with these parameters and judge the run."""
    request = pb.TrainRequest(name="advised", parameters=parameters)
    finished = training.run(inputs(base, rows), training_spec(request), folder, Watcher())
    assert finished is not None
    history = from_curve(loss_curve(finished.run.log), epochs=finished.run.epochs)
    return diagnose(Subject("advised", history, Facts(rows=24, rank=4), resolve(request).parameters))


def test_a_run_that_was_too_short_is_mended_by_its_own_advice(small_base: Path, harbour: Path, tmp_path: Path) -> None:
    first = pb.TrainingParameters(epochs=1, learning_rate=5e-3, batch_size=2, lora=pb.LoraParameters(r=4))
    answer = trained(small_base, harbour, first, tmp_path / "first")
    assert answer.verdict == pb.VERDICT_UNDERTRAINED and answer.config_patch.fields
    second = pb.TrainingParameters()
    second.CopyFrom(first)
    # As a program does it: the patch is JSON with the contract's own names.
    json_format.ParseDict(json_format.MessageToDict(answer.config_patch), second)
    assert second.epochs > first.epochs
    after = trained(small_base, harbour, second, tmp_path / "second")
    assert after.loss_curve[-1].loss < 0.7 * answer.loss_curve[-1].loss
