"""A wish to stop is heard in an evaluation and between sample answers: the checkpoint comes in a bounded time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.sft_trainer import SFTTrainer

from loraline.trainer import checkpoints
from loraline.trainer.engines import samples, training
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec

pytestmark = pytest.mark.slow
PROMPTS = [f"Who are you {number}?" for number in range(6)]
SLOW = 0.5
"""Seconds that a batch of an evaluation, or an answer, is made to take here; all of them take far longer than BOUND."""
BOUND = 4.0
"""Seconds from the wish to the end of the run, with room for a loaded machine."""


@dataclass
class Asked(Watcher):
    """Asked to stop at a moment that a test chooses."""

    asked_at: float = 0.0
    cause: str = "handover"

    @property
    def stop_cause(self) -> str:
        return self.cause if self.asked_at else ""

    def ask(self) -> None:
        self.asked_at = self.asked_at or time.monotonic()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", harbour_rows())
    return write_rows(folder, harbour_rows(), "validation")


@pytest.fixture(scope="module")
def whole(small_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> training.FinishedRun:
    """An uninterrupted run, for the others to compare with."""
    finished = training.run(asking(small_base, dataset), settings(), tmp_path_factory.mktemp("whole"), Watcher())
    assert finished is not None
    return finished


def asking(base: Path, dataset: Path) -> training.RunInputs:
    return replace(inputs(base, dataset), sample_prompts=PROMPTS)


def settings() -> Any:
    return spec(epochs=1, batch_size=2, eval_steps=6, save_steps=50)


def stopped(base: Path, dataset: Path, workdir: Path, watcher: Asked) -> Path | None:
    """Run until it stops; return the checkpoint that it left."""
    assert training.run(asking(base, dataset), settings(), workdir, watcher) is None
    assert watcher.asked_at
    assert time.monotonic() - watcher.asked_at < BOUND
    return checkpoints.newest_good(workdir / "checkpoints")[0]


def goes_on_to_the_same_end(base: Path, dataset: Path, workdir: Path, whole: training.FinishedRun) -> None:
    finished = training.run(asking(base, dataset), settings(), workdir, Watcher())
    assert finished is not None
    assert digest(finished.folder) == digest(whole.folder)
    assert finished.samples == whole.samples
    evaluations = [[e for e in run.log if "eval_loss" in e] for run in (finished.run, whole.run)]
    assert [(e["step"], e["eval_loss"]) for e in evaluations[0]] == [
        (e["step"], e["eval_loss"]) for e in evaluations[1]
    ]


@pytest.mark.parametrize("cause", ["handover", "cancel"])
def test_an_evaluation_is_cut_short(
    small_base: Path,
    dataset: Path,
    tmp_path: Path,
    whole: training.FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
) -> None:
    watcher, real = Asked(cause=cause), SFTTrainer.prediction_step

    def prediction_step(self: Any, *rest: Any, **more: Any) -> Any:
        watcher.ask()
        time.sleep(SLOW)
        return real(self, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(SFTTrainer, "prediction_step", prediction_step)
        left = stopped(small_base, dataset, tmp_path, watcher)
    if cause == "cancel":
        assert left is None
        return
    assert left is not None and left.name == "checkpoint-6"
    goes_on_to_the_same_end(small_base, dataset, tmp_path, whole)


def test_sample_answers_are_cut_short(
    small_base: Path,
    dataset: Path,
    tmp_path: Path,
    whole: training.FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of the second evaluation's, at the last step: the base and the first one have answered before."""
    watcher, real, answered = Asked(), samples.greedy, []

    def greedy(*arguments: Any) -> list[int]:
        answered.append(1)
        if len(answered) >= 2 * 10 + 5:
            watcher.ask()
            time.sleep(SLOW)
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(samples, "greedy", greedy)
        left = stopped(small_base, dataset, tmp_path, watcher)
    assert left is not None and left.name == "checkpoint-12"
    goes_on_to_the_same_end(small_base, dataset, tmp_path, whole)
