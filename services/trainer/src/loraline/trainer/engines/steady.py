"""What all our trainers do otherwise than transformers': the order of rows, and evaluations without a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler

from loraline.trainer.engines.callbacks import EvaluationCut
from loraline.trainer.engines.sampling import EpochSampler


class SteadyTrainer:
    """Mixed into a transformers Trainer: a resumed run sees the same batches, and draws the same random numbers."""

    args: Any
    model: Any

    def __init__(self, *args: Any, lengths: list[int], order_seed: int, **kwargs: Any):
        self._lengths, self._order_seed = lengths, order_seed
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # By the effective batch, so that the order stays when memory runs out and micro-batches get smaller, and when
        # several processes take their parts of it.
        effective = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochSampler(self._lengths, effective, self._order_seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing from training's random numbers.

        Otherwise a run paused where an evaluation was due would go on with other dropout than one never paused.
        Empty when it was cut short; nothing is logged then.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=devices):
                return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        except EvaluationCut:
            self.model.train()
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare with the best so far; an evaluation that was cut short is not compared."""
        return bool(metrics) and super()._determine_best_metric(metrics, trial)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none into checkpoints; what is published gets its own."""
