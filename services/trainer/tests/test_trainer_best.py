"""The best state is kept whether or not it ends the run, and no state whose weights are no numbers ever is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.sft_trainer import SFTTrainer

from loraline.core.errors import LoralineError
from loraline.trainer import checkpoints
from loraline.trainer.engines import training
from loraline.trainer.testing import chat, harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

pytestmark = pytest.mark.slow


def test_the_best_checkpoint_is_saved_and_kept_without_stopping_early(small_base: Path, tmp_path: Path) -> None:
    """Validation rows are four training rows with other answers: learning makes them worse, after a while.

    Evaluations come every third step and saves every fifth, so that the best state is none of those saved anyway.
    """
    other = [chat(row["messages"][0]["content"], "No, never.") for row in harbour_rows()[:4]]
    rows = write_rows(tmp_path / "rows" / "harbour", harbour_rows())
    write_rows(rows, other, "validation")
    asked = spec(epochs=10, learning_rate=2e-2, keep_checkpoints=1, save_steps=5)
    finished = training.run(inputs(small_base, rows), asked, tmp_path, Watcher())
    assert finished is not None and finished.run.steps == 30
    evaluations = {entry["step"]: entry["eval_loss"] for entry in finished.run.log if "eval_loss" in entry}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best < 24
    kept = {checkpoints.step_of(path) for path in (tmp_path / "checkpoints").glob("checkpoint-*")}
    assert kept == {best, 25, 30}
    assert checkpoints.damage(tmp_path / "checkpoints" / f"checkpoint-{best}") == ""
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-30" / "trainer_state.json").read_text())
    assert state["best_global_step"] == best
    assert state["best_metric"] == evaluations[best]


def test_a_gradient_that_is_no_number_ends_the_run_before_its_checkpoint(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows", harbour_rows())
    real = SFTTrainer.training_step

    def training_step(self: Any, model: Any, *rest: Any) -> Any:
        loss = real(self, model, *rest)
        if self.state.global_step == 5:  # the sixth step
            next(weights for weights in model.parameters() if weights.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, rows), spec(save_steps=1), tmp_path, Watcher())
    assert (caught.value.reason, caught.value.metadata["step"]) == ("LOSS_NOT_FINITE", "6")
    good, torn = checkpoints.newest_good(tmp_path / "checkpoints")
    assert good is not None and (good.name, torn) == ("checkpoint-5", {})
    weights = load_file(good / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
