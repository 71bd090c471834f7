"""TRL's SFTTrainer on rows that are tokens and labels already, with what we do differently."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import SFTTrainer

from loraline.trainer.engines.head import answer_loss, answer_positions, takes_positions
from loraline.trainer.engines.sampling import EpochSampler


class RowTrainer(SFTTrainer):
    """SFTTrainer with our order of rows, our loss on a CPU, and evaluations that leave the training as it was."""

    def __init__(self, *args: Any, lengths: list[int], order_seed: int, **kwargs: Any):
        self._lengths, self._order_seed = lengths, order_seed
        super().__init__(*args, **kwargs)
        self._plain_head = (
            self.accelerator.device.type == "cpu" and not self.aux_loss_enabled and takes_positions(self.model)
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # By the effective batch, so that the order stays when memory runs out and micro-batches get smaller.
        effective = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(self._lengths, effective, self._order_seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss as TRL does; on a CPU with the logits of the answers alone."""
        kept = None
        if not return_outputs and self._plain_head:
            kept = answer_positions(inputs["labels"], int(self.model.config.vocab_size))  # type: ignore[union-attr]
        if kept is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = answer_loss(model, inputs, kept, num_items_in_batch)
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        self._metrics[mode]["mean_token_accuracy"].append(found.accuracy)
        if mode == "train":
            self._total_train_tokens += int(inputs["attention_mask"].sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return found.loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing from training's random numbers.

        Otherwise a run paused where an evaluation was due would go on with other dropout than one never paused.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none into checkpoints; the adapter gets its own."""
