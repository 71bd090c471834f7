"""What happens while the trainer runs: progress, stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraline.core.errors import failed_precondition
from loraline.trainer.engines import ranks

REWARDS = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
"""Our names of what DPO measures, and TRL's."""
_LOGGED = {
    **{name: name for name in ("loss", "learning_rate", "grad_norm", "epoch")},
    "token_accuracy": "mean_token_accuracy",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    **REWARDS,
}
"""Figures of a step, and what they are called in the log."""


class RunObserver(Protocol):
    """What the engine tells the job, and what it asks it."""

    def progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        """Called after every optimizer step and evaluation."""
        ...

    def note(self, message: str, *, severity: str = "info", reason: str = "") -> None:
        """Something worth an event."""
        ...

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to one of the trainer's counters."""
        ...

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is complete and sealed; what keeps its files must take them now."""
        ...

    @property
    def run(self) -> str:
        """Name of the run."""
        ...

    @property
    def stop_cause(self) -> str:
        """Empty, or why the run shall stop: `cancel`, `pause`, `handover`."""
        ...


class LiveProgress(TrainerCallback):
    """Reports loss, token accuracy, speed and the time left; stops a run whose loss is no number."""

    def __init__(self, observer: RunObserver, clock: Callable[[], float] = time.monotonic):
        self.observer, self.clock = observer, clock
        self.metrics: dict[str, float] = {}
        self.begin, self.first_step = clock(), 0
        self.last_time, self.last_tokens, self.last_step = self.begin, 0.0, 0
        self._evaluated = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock; a resumed run counts from where it went on."""
        self.begin = self.last_time = self.clock()
        self.first_step = self.last_step = state.global_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave an evaluation, and the sample answers after it, out of the next step's time."""
        if self._evaluated:
            self.last_time, self._evaluated = self.clock(), False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take over the figures of a step or an evaluation."""
        logs = logs or {}
        if "loss" in logs:
            _refuse_not_finite(logs, state.global_step, scaled=args.fp16)
            self._take_step(logs, state.global_step)
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            if self.metrics.get("step_seconds"):
                self.metrics["samples_per_second"] = rows / self.metrics["step_seconds"]
        elif "eval_loss" in logs:
            self.metrics["eval_loss"] = float(logs["eval_loss"])
            self._evaluated = True
        else:
            return
        done = state.global_step - self.first_step
        pace = (self.clock() - self.begin) / done if done > 0 else 0.0
        eta = pace * max(0, state.max_steps - state.global_step)
        self.observer.progress(state.global_step, state.max_steps, eta, dict(self.metrics))

    def _take_step(self, logs: dict[str, float], step: int) -> None:
        now, tokens = self.clock(), float(logs.get("num_tokens", 0.0))
        if step > self.last_step:
            self.metrics["step_seconds"] = (now - self.last_time) / (step - self.last_step)
        if torch.cuda.is_available():
            self.metrics["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        if now > self.last_time and tokens > self.last_tokens:
            self.metrics["tokens_per_second"] = (tokens - self.last_tokens) / (now - self.last_time)
        self.last_time, self.last_tokens, self.last_step = now, tokens, step
        self.metrics |= {name: float(logs[logged]) for name, logged in _LOGGED.items() if logged in logs}


def _refuse_not_finite(logs: dict[str, float], step: int, *, scaled: bool) -> None:
    """End a run before the checkpoint of a step whose loss or gradient is no number: its weights are none either.

    With `scaled` losses (fp16) single steps overflow as a matter of course; the scaler leaves such gradients out.
    """
    looked_at = ("loss",) if scaled else ("loss", "grad_norm")
    for name in looked_at:
        if name in logs and not math.isfinite(float(logs[name])):
            what = "loss" if name == "loss" else "gradient's norm"
            message = (
                f"The {what} is {logs[name]} at step {step}: the run diverged. Lower parameters.learning_rate, or use "
                "parameters.dtype fp32."
            )
            raise failed_precondition("LOSS_NOT_FINITE", message, step=str(step))


class EvaluationCut(Exception):
    """Raised within an evaluation that shall not be finished."""


class Stopping(TrainerCallback):
    """Ends a run that was asked to stop: with a checkpoint, unless it is cancelled.

    The wish is looked for after each step, batch of an evaluation, and sample answer, so that none of them keeps the
    checkpoint waiting. Whoever goes on makes up for what was cut short, so that the log has no gap.
    """

    def __init__(self, observer: RunObserver):
        self.observer = observer
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave out an evaluation that is due."""
        if self._asked(control):
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave an evaluation in its middle."""
        if self._asked(control):
            raise EvaluationCut

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look once more, for the sample answers may have been cut short."""
        self._asked(control)

    def _asked(self, control: TrainerControl) -> bool:
        """Look for the wish and obey it; what the first process sees goes for all."""
        cause = ranks.from_first(self.observer.stop_cause)
        if cause:
            self.stopped = True
            control.should_training_stop = True
            control.should_save = cause != "cancel"
        return bool(cause)
