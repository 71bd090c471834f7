"""report_to: libraries that are missing are named before the run, those that are there get its figures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraline.core.errors import LoralineError
from loraline.trainer import reporting
from loraline.trainer.engines import training
from loraline.trainer.reporting import prepare_reports
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoralineError) as caught:
        prepare_reports(["wandb", "mlflow"], "harbour", tmp_path)
    assert caught.value.reason == "REPORTER_MISSING"
    assert "pip install wandb mlflow" in caught.value.message
    prepare_reports([], "harbour", tmp_path)


def test_the_operators_own_places_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    for variable in ("MLFLOW_EXPERIMENT_NAME", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(variable, "")  # so that what is set below goes when the test ends
        monkeypatch.delenv(variable)
    prepare_reports(["mlflow", "tensorboard"], "harbour", tmp_path)
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard" / "harbour")


@pytest.mark.slow
def test_tensorboard_gets_the_curve(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    prepare_reports(["tensorboard"], "harbour", tmp_path / "reports")
    rows = write_rows(tmp_path / "rows", harbour_rows(8))
    asked = spec(max_steps=3, report_to=["tensorboard"])
    finished = training.run(inputs(small_base, rows), asked, tmp_path / "work", Watcher())
    assert finished is not None
    read = EventAccumulator(str(tmp_path / "reports" / "tensorboard" / "harbour"))
    read.Reload()
    told = [(event.step, event.value) for event in read.Scalars("train/loss")]
    logged = [(entry["step"], pytest.approx(entry["loss"], rel=1e-5)) for entry in finished.run.log if "loss" in entry]
    assert told == logged
