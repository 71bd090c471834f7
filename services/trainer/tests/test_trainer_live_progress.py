"""Speed and time left of a resumed run, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraline.trainer.engines.callbacks import LiveProgress
from loraline.trainer.testing_runs import Watcher


class Told(Watcher):
    """Keeps the step, the steps in all and the seconds left, too."""

    last: tuple[int, int, float] = (0, 0, 0.0)

    def progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        self.last = (step, total, eta_seconds)
        super().progress(step, total, eta_seconds, metrics)


class Run:
    """A run of 40 steps that went on at step 30, at 100 on the clock."""

    def __init__(self, folder: Path):
        self.now = 0.0
        self.told = Told()
        self.arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=4, use_cpu=True
        )
        self.state = TrainerState(global_step=30, max_steps=40)
        self.live = LiveProgress(self.told, clock=lambda: self.now)
        self.now = 100.0  # loading took as long; it counts for nothing
        self.live.on_train_begin(self.arguments, self.state, TrainerControl())

    def log(self, step: int, now: float, **logs: float) -> tuple[float, dict[str, float]]:
        """Log these figures; return the seconds left and the metrics that were told."""
        self.now, self.state.global_step = now, step
        self.live.on_log(self.arguments, self.state, TrainerControl(), logs)
        assert self.told.last[:2] == (step, 40)
        return self.told.last[2], self.told.metrics[-1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_resumed_run_reckons_from_where_it_went_on(run: Run) -> None:
    eta, metrics = run.log(31, 102.0, loss=0.5, num_tokens=1000.0)
    assert (metrics["step_seconds"], metrics["tokens_per_second"], metrics["samples_per_second"]) == (2.0, 500.0, 8.0)
    assert eta == 2.0 * 9
    # Two steps behind one entry of the log, and slower ones.
    eta, metrics = run.log(33, 110.0, loss=0.4, num_tokens=3000.0, mean_token_accuracy=0.9)
    assert (metrics["step_seconds"], metrics["tokens_per_second"], metrics["samples_per_second"]) == (4.0, 250.0, 4.0)
    assert metrics["token_accuracy"] == 0.9
    assert eta == pytest.approx(10 / 3 * 7)


def test_an_evaluation_counts_for_the_time_left_and_not_for_the_speed_told_with_it(run: Run) -> None:
    run.log(32, 104.0, loss=0.5, num_tokens=800.0)
    eta, metrics = run.log(32, 124.0, eval_loss=0.7)
    assert (metrics["eval_loss"], metrics["loss"]) == (0.7, 0.5)
    assert (metrics["step_seconds"], metrics["tokens_per_second"]) == (2.0, 200.0)
    # More evaluations will come: what they take is part of the pace.
    assert eta == 24 / 2 * 8
    run.now = 130.0  # six seconds of sample answers
    run.live.on_step_begin(run.arguments, run.state, TrainerControl())
    _, metrics = run.log(33, 132.0, loss=0.4, num_tokens=1200.0)
    assert (metrics["step_seconds"], metrics["tokens_per_second"], metrics["samples_per_second"]) == (2.0, 200.0, 8.0)


def test_the_end_leaves_nothing_to_wait_for(run: Run) -> None:
    eta, _ = run.log(40, 120.0, loss=0.1, num_tokens=9000.0)
    assert eta == 0.0
    count = len(run.told.metrics)
    # The summary at the end of a training is neither a step nor an evaluation.
    run.live.on_log(run.arguments, run.state, TrainerControl(), {"train_runtime": 20.0, "train_loss": 0.3})
    assert len(run.told.metrics) == count
