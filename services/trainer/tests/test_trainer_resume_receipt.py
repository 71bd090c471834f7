"""The first loss after resuming: stopped above the band, told below it, and lenient where the band says little."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraline.core.errors import LoralineError
from loraline.trainer.engines.data_position import DataPosition
from loraline.trainer.engines.resuming import ResumeReceipt, expected_band
from loraline.trainer.testing_runs import Watcher

ROWS = DataPosition("aa", 8, 0)
FALLEN = [3.6 * math.exp(-step / 8) + 0.4 + 0.02 * (-1) ** step for step in range(60)]
"""From 4.0 down to 0.4, with a band of about 0.2 to 0.73 behind it."""


def resume(folder: Path, before: list[float], loss: float, *, rows: DataPosition = ROWS) -> Watcher:
    """Let a checkpoint of `ROWS` with these losses be gone on from, on `rows`; the next step's loss is `loss`."""
    checkpoint = folder / f"checkpoint-{len(before)}"
    checkpoint.mkdir()
    ROWS.save(checkpoint)
    log = [{"step": float(step), "loss": value} for step, value in enumerate(before, start=1)]
    state = TrainerState(global_step=len(before), log_history=log)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    watcher = Watcher()
    receipt = ResumeReceipt(watcher, rows)
    receipt.on_train_begin(arguments, state, TrainerControl())
    state.global_step += 1
    receipt.on_log(arguments, state, TrainerControl(), {"eval_loss": 99.0})
    receipt.on_log(arguments, state, TrainerControl(), {"loss": loss})
    # Judged once: what comes later is the run's own course.
    receipt.on_log(arguments, state, TrainerControl(), {"loss": 99.0})
    return watcher


@pytest.mark.parametrize("loss", [0.8, 2.0, 4.0])
def test_above_the_band_the_run_stops(tmp_path: Path, loss: float) -> None:
    """Half-way back to the start is lost as well."""
    with pytest.raises(LoralineError) as caught:
        resume(tmp_path, FALLEN, loss)
    assert (caught.value.reason, caught.value.code.name) == ("RESUME_LOST_STATE", "FAILED_PRECONDITION")
    low, high = expected_band(FALLEN)
    assert f"{loss:.3f}, expected {low:.3f} to {high:.3f}" in caught.value.message
    assert "began at 3." in caught.value.message and "BACKUP_AND_RESTART" in caught.value.message


@pytest.mark.parametrize("loss", [0.25, 0.4, 0.58])
def test_inside_the_band_it_is_told_as_restored(tmp_path: Path, loss: float) -> None:
    assert resume(tmp_path, FALLEN, loss).notes == ["RESUME_RECEIPT"]


def test_below_the_band_it_is_only_told(tmp_path: Path) -> None:
    assert resume(tmp_path, FALLEN, 0.05).notes == ["RESUME_RECEIPT_OFF"]


@pytest.mark.parametrize("rows", [DataPosition("bb", 8, 0), DataPosition("aa", 16, 0), DataPosition("aa", 8, 1)])
def test_other_data_explains_another_loss(tmp_path: Path, rows: DataPosition) -> None:
    assert resume(tmp_path, FALLEN, 4.0, rows=rows).notes == ["RESUME_DATA_CHANGED", "RESUME_RECEIPT_OFF"]


def test_a_few_steps_show_no_band_to_stop_by(tmp_path: Path) -> None:
    assert resume(tmp_path, [0.3] * 19, 4.0).notes == ["RESUME_RECEIPT_OFF"]
    with pytest.raises(LoralineError):
        resume(tmp_path, [0.3] * 20, 4.0)


def test_a_fresh_run_has_nothing_to_compare(tmp_path: Path) -> None:
    assert resume(tmp_path, [], 4.0).notes == []


def test_the_band_reaches_to_the_highest_of_the_later_half() -> None:
    """A hard batch that came 40 steps ago may come again; the losses of the start do not count."""
    hard = [*FALLEN, *[0.4] * 9, 2.5, *[0.4] * 40]
    assert expected_band(hard)[1] == 2.5
    assert expected_band(FALLEN)[1] == pytest.approx(0.73, abs=0.01)
    assert expected_band([0.3]) == pytest.approx((0.15, 0.45))


@pytest.mark.parametrize("steps", [20, 40, 200])
def test_small_noisy_batches_are_seldom_taken_for_a_lost_state(steps: int) -> None:
    """Losses that scatter by a factor of 1.35 from step to step (log-normal), behind a start at 3.6 nats."""
    draw = random.Random(steps)
    for level in (0.05, 0.3, 1.0):
        above = 0
        for _ in range(2000):
            *before, following = [level * math.exp(draw.gauss(0, 0.3)) for _ in range(steps + 1)]
            above += following > expected_band([3.6, *before])[1]
        assert above <= 30, "three in two hundred"
