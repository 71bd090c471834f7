"""The proof that a resumed run goes on from where it was, and not from the start."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraline.core.errors import LoralineError, failed_precondition
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.data_position import DataPosition

_LAST = 20
_LATE = 100
_ENOUGH = 20
"""Fewer logged steps than this show no band to stop a run by; losing them costs little."""
_GAIN = 0.1
"""Share of what a run has gained since its start that one batch may be off by."""


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

    At least half the mean and 0.1 nats either way, because batches differ more than a short stretch shows. Upwards also
    a tenth of what the run has gained, and the highest of its later half (at most 100 steps): a rare hard batch is no
    lost state.
    """
    last = losses[-_LAST:]
    mean = statistics.fmean(last)
    reach = max(4 * statistics.pstdev(last), 0.5 * mean, 0.1)
    late = losses[-min(_LATE, max(1, len(losses) // 2)) :]
    return max(0.0, mean - reach), max(mean + reach, mean + _GAIN * (_start(losses) - mean), *late)


def _start(losses: Sequence[float]) -> float:
    """Return the mean loss of the run's first twentieth."""
    return statistics.fmean(losses[: max(1, len(losses) // 20)])


class ResumeReceipt(TrainerCallback):
    """Compares the rows and the first loss after resuming with those before it.

    Optimizer, scheduler and random numbers need no comparison: their files match the checkpoint's seal.
    """

    def __init__(self, observer: RunObserver, position: DataPosition):
        self.observer, self.position = observer, position
        self.before: list[float] = []
        self.changed = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what was logged before, and tell when the position in the data is one in other data."""
        step = state.global_step
        self.before = [entry["loss"] for entry in state.log_history if "loss" in entry] if step else []
        self.changed = self.position.changed_since(Path(str(args.output_dir)) / f"checkpoint-{step}") if step else ""
        if self.changed:
            told = (
                f"not those of the checkpoint: {self.changed}. Steps from here on see other rows than they would have"
            )
            self.observer.note(told, severity="warning", reason="RESUME_DATA_CHANGED")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Judge the first loss after resuming, once.

        Raises FAILED_PRECONDITION (RESUME_LOST_STATE) when it lies above the expected band though the rows are those of
        the checkpoint. Only a warning (RESUME_RECEIPT_OFF) when it lies below, where other rows explain it, or where
        fewer than 20 steps were logged.
        """
        if not self.before or "loss" not in (logs or {}):
            return
        before, self.before = self.before, []
        loss = float((logs or {})["loss"])
        low, high = expected_band(before)
        facts = f"first loss after resuming {loss:.3f}, expected {low:.3f} to {high:.3f}"
        if low <= loss <= high:
            self.observer.note(f"{facts}: the state is restored", reason="RESUME_RECEIPT")
        elif loss > high and not self.changed and len(before) >= _ENOUGH:
            raise _lost_state(facts, before)
        else:
            self.observer.note(facts, severity="warning", reason="RESUME_RECEIPT_OFF")


def _lost_state(facts: str, before: Sequence[float]) -> LoralineError:
    message = (
        f"{facts}; the run began at {_start(before):.3f}. On the same rows this means that its state was not restored. "
        "Nothing more was trained. Set lora.dropout, neftune_alpha, dtype and quantization as they were; where the "
        "checkpoint is good and the rows alone are hard, CONTINUE with another seed, which turns this into a warning; "
        "or start anew with existing_run BACKUP_AND_RESTART."
    )
    return failed_precondition("RESUME_LOST_STATE", message)
