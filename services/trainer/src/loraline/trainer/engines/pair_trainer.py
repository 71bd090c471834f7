"""TRL's DPOTrainer on pairs that are tokens already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl.trainer.dpo_trainer import DPOTrainer

from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.steady import SteadyTrainer


class PairTrainer(SteadyTrainer, DPOTrainer):
    """DPOTrainer with our order of rows; the reference is the adapter as the run began, or the base without one."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Leave the pairs as they are: tokens whose masks were proven."""
        return dataset

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the adapter that learns, too: beside a copy of it transformers restores the copy alone."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        tuned: Any = self.model
        if "ref" in tuned.peft_config:
            tuned.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            tuned.set_adapter("default")


def pair_dataset(rows: Sequence[EncodedRow]) -> Dataset:
    """Return pairs as DPOTrainer takes them: the prompt's ids, and each answer's up to its last token with loss."""
    pairs = [(row, row.rejected) for row in rows if row.rejected is not None]
    begins = [row.mask.index(1) for row, _ in pairs]
    return Dataset.from_dict(
        {
            "prompt_ids": [row.input_ids[:begin] for (row, _), begin in zip(pairs, begins, strict=True)],
            "chosen_ids": [_answer(row, begin) for (row, _), begin in zip(pairs, begins, strict=True)],
            "rejected_ids": [_answer(other, begin) for (_, other), begin in zip(pairs, begins, strict=True)],
        }
    )


def _answer(row: EncodedRow, begin: int) -> list[int]:
    end = len(row.mask) - row.mask[::-1].index(1)
    return row.input_ids[begin:end]
