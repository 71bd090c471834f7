"""report_to: libraries that are missing are named before the run, those that are there get its figures."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
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


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which nobody has said where to report to."""
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_DIR", "TRACKIO_PROJECT", "WANDB_DIR",
                     "WANDB_PROJECT", "WANDB_MODE", "WANDB_API_KEY"):  # fmt: skip
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def reported(name: str, base: Path, folder: Path) -> list[float]:
    """Train three steps that are reported; return their losses."""
    prepare_reports([name], "harbour", folder / "reports")
    rows = write_rows(folder / "rows", harbour_rows(8))
    finished = training.run(inputs(base, rows), spec(max_steps=3, report_to=[name]), folder / "work", Watcher())
    assert finished is not None
    return [entry["loss"] for entry in finished.run.log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_mlflow_gets_the_curve(small_base: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    losses = reported("mlflow", small_base, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'reports' / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("loraline").experiment_id])
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss")] == pytest.approx(losses)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_trackio_gets_the_curve(small_base: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:  # not imported here: it reads its folder when it is
        pytest.skip("trackio is not installed")
    losses = reported("trackio", small_base, tmp_path)
    with sqlite3.connect(tmp_path / "reports" / "trackio" / "loraline.db") as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(losses)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_wandb_writes_a_run_to_be_sent_later_where_there_is_no_key(small_base: Path, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    assert len(reported("wandb", small_base, tmp_path)) == 3
    wandb.finish()  # as it does when the job's process ends
    assert os.environ["WANDB_MODE"] == "offline"
    (kept,) = (tmp_path / "reports" / "wandb" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in kept.read_bytes()
