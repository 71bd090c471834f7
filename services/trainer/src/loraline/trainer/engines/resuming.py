"""The proof that a resumed run goes on from where it was, and not from the start."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraline.core.errors import failed_precondition
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.data_position import DataPosition

_LAST = 20


class OverdueEvaluation(TrainerCallback):
    """Evaluates before a resumed run's first step where that was due and left out.

    A hand-over has little time: it saves at once, and whoever goes on makes up for the evaluation. Added last, so that
    the other callbacks have begun.
    """

    def __init__(self, trainer: Any, every: int):
        self.trainer, self.every = trainer, every

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate the weights that were loaded, and let them count as the best where they are."""
        step = state.global_step
        if (
            not step
            or step % self.every
            or any(entry.get("step") == step and "eval_loss" in entry for entry in state.log_history)
        ):
            return
        metrics = self.trainer.evaluate()
        if self.trainer._determine_best_metric(metrics, None):
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{step}")


def expected_band(losses: Sequence[float]) -> tuple[float, float]:
    """Return where the next step's loss should lie: the mean of the last 20, four standard deviations either way.

    At least half the mean and 0.1 nats either way, because batches differ more than a short stretch shows.
    """
    last = losses[-_LAST:]
    mean = statistics.fmean(last)
    reach = max(4 * statistics.pstdev(last), 0.5 * mean, 0.1)
    return max(0.0, mean - reach), mean + reach


class ResumeReceipt(TrainerCallback):
    """Compares the rows and the first loss after resuming with those before it.

    Optimizer, scheduler and random numbers need no comparison: their files match the checkpoint's seal.
    """

    def __init__(self, observer: RunObserver, position: DataPosition):
        self.observer, self.position = observer, position
        self.before: list[float] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what was logged before, and tell when the position in the data is one in other data."""
        step = state.global_step
        self.before = [entry["loss"] for entry in state.log_history if "loss" in entry] if step else []
        changed = self.position.changed_since(Path(str(args.output_dir)) / f"checkpoint-{step}") if step else ""
        if changed:
            told = f"not those of the checkpoint: {changed}. Steps from here on see other rows than they would have"
            self.observer.note(told, severity="warning", reason="RESUME_DATA_CHANGED")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Judge the first loss; raises FAILED_PRECONDITION (RESUME_LOST_STATE) when it is the start's again."""
        if not self.before or "loss" not in (logs or {}):
            return
        before, self.before = self.before, []
        loss = float((logs or {})["loss"])
        low, high = expected_band(before)
        facts = f"first loss after resuming {loss:.3f}, expected {low:.3f} to {high:.3f}"
        if low <= loss <= high:
            self.observer.note(f"{facts}: the state is restored", reason="RESUME_RECEIPT")
            return
        start, now = statistics.fmean(before[: max(1, len(before) // 20)]), statistics.fmean(before[-_LAST:])
        if loss > high and now < 0.7 * start and loss > 0.9 * start:
            message = (
                f"{facts}; the run began at {start:.3f}: its state was not restored. Nothing more was trained. Look at "
                "the checkpoint, or start anew with existing_run BACKUP_AND_RESTART."
            )
            raise failed_precondition("RESUME_LOST_STATE", message)
        self.observer.note(facts, severity="warning", reason="RESUME_RECEIPT_OFF")
