"""Checkpoints are sealed while training goes on; what keeps one from being sealed ends the run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraline.trainer import checkpoints
from loraline.trainer.engines.data_position import data_position
from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.sealing import SealedCheckpoints
from loraline.trainer.testing_runs import Watcher


class Saved(Watcher):
    """Keeps the names of sealed checkpoints."""

    names: list[str]

    def saved(self, checkpoint: Path) -> None:
        super().saved(checkpoint)
        self.names = [*getattr(self, "names", []), checkpoint.name]


class Steps:
    """Plays the trainer: writes the files of a checkpoint, then tells the callback."""

    def __init__(self, folder: Path, keep: int = 1):
        self.args: Any = SimpleNamespace(output_dir=str(folder))
        self.state: Any = SimpleNamespace(global_step=0, best_model_checkpoint=None, best_metric=None)
        self.control: Any = SimpleNamespace(should_save=False, should_training_stop=False)
        self.watcher = Saved()
        rows = [EncodedRow("row", [], [1, 2], [0, 1])]
        self.sealed = SealedCheckpoints(
            self.watcher, keep=keep, position=data_position(rows, effective_batch=1, seed=0)
        )

    def step(self, *, save: bool = True) -> None:
        self.state.global_step += 1
        self.sealed.on_step_end(self.args, self.state, self.control)
        if save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir()
            (folder / "weights").write_bytes(b"w" * 100)
            self.sealed.on_save(self.args, self.state, self.control)

    def end(self) -> None:
        self.sealed.on_train_end(self.args, self.state, self.control)
        self.sealed.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Sealing waits until this is set."""
    opened, seal = threading.Event(), checkpoints.seal

    def slow(folder: Path) -> None:
        assert opened.wait(30)
        seal(folder)

    monkeypatch.setattr(checkpoints, "seal", slow)
    return opened


def test_steps_go_on_while_a_checkpoint_is_sealed(tmp_path: Path, gate: threading.Event) -> None:
    steps = Steps(tmp_path)
    steps.step()
    for _ in range(3):
        steps.step(save=False)
    assert steps.watcher.notes == [] and checkpoints.newest_good(tmp_path)[0] is None  # it does not count yet
    gate.set()
    deadline = time.monotonic() + 30
    while not steps.watcher.notes and time.monotonic() < deadline:
        time.sleep(0.01)
        steps.step(save=False)
    assert steps.watcher.notes == ["CHECKPOINT_SAVED"] and steps.watcher.names == ["checkpoint-1"]
    steps.end()
    assert steps.watcher.notes == ["CHECKPOINT_SAVED"]


def test_the_next_checkpoint_and_the_end_wait_for_the_one_under_way(tmp_path: Path, gate: threading.Event) -> None:
    steps = Steps(tmp_path)
    steps.step()
    threading.Timer(0.2, gate.set).start()
    steps.step()
    assert steps.watcher.names == ["checkpoint-1"]
    steps.end()
    assert steps.watcher.names == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints.newest_good(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_old_ones_go_only_when_the_new_one_is_sealed(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    steps = Steps(tmp_path, keep=0)
    steps.step()
    steps.sealed.on_step_end(steps.args, steps.state, steps.control)
    steps.step()
    assert (tmp_path / "checkpoint-1").is_dir()
    steps.end()
    assert not (tmp_path / "checkpoint-1").exists() and (tmp_path / "checkpoint-2").is_dir()


def test_one_under_way_when_an_error_ends_the_training_is_told_of(tmp_path: Path, gate: threading.Event) -> None:
    steps = Steps(tmp_path)
    steps.step()
    threading.Timer(0.2, gate.set).start()
    steps.sealed.close()  # no step and no end of training comes any more
    assert steps.watcher.names == ["checkpoint-1"]


@pytest.mark.parametrize("when", ["step", "save", "end"])
def test_what_kept_it_from_being_sealed_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def full(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "seal", full)
    steps = Steps(tmp_path)
    steps.step()
    time.sleep(0.2 if when == "step" else 0)
    with pytest.raises(OSError, match="No space"):
        if when == "end":
            steps.end()
        else:
            steps.step(save=when == "save")
    assert steps.watcher.notes == []
