"""TRL's SFTTrainer on rows that are tokens and labels already, with what we do differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl.trainer.sft_trainer import SFTTrainer

from loraline.trainer.engines import ranks
from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.head import answer_loss, answer_positions, takes_positions
from loraline.trainer.engines.steady import SteadyTrainer


class RowTrainer(SteadyTrainer, SFTTrainer):
    """SFTTrainer with our order of rows, our loss on a CPU, and evaluations that leave the training as it was."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # TRL's head gathers its figures from all processes, which must then all take it.
        alone = ranks.count() == 1
        self._plain_head = (
            alone
            and self.accelerator.device.type == "cpu"
            and not self.aux_loss_enabled
            and takes_positions(self.model)
        )

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
            # Packed rows come without a mask, because nothing is padded.
            mask = inputs.get("attention_mask")
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return found.loss


def row_dataset(rows: Sequence[EncodedRow]) -> Dataset:
    """Return rows as SFTTrainer takes them."""
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
