"""What the model is shown first: the tokens of the first batch, their text, and which of them carry loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from loraline.trainer.batch_view import ShownRow, save_rows
from loraline.trainer.engines import ranks
from loraline.trainer.engines.callbacks import RunObserver

MAX_ROWS = 4
MAX_TOKENS = 512


def show_first_batch(trainer: Any, tokenizer: PreTrainedTokenizerBase, file: Path, observer: RunObserver) -> None:
    """Write the first batch to `file` and tell of it; the first of several processes shows its own."""
    if not ranks.first():
        return
    rows = list(collated_rows(trainer))
    shown = [_described(ids, trained, tokenizer) for ids, trained in rows[:MAX_ROWS]]
    save_rows(shown, file)
    tokens, carry = sum(len(ids) for ids, _ in rows), sum(sum(trained) for _, trained in rows)
    observer.note(
        f"the first batch shows {len(rows)} rows of {tokens} tokens, {carry} of them carry loss; see them with "
        f"`loraline runs batch {observer.run}`",
        reason="FIRST_BATCH",
    )


def collated_rows(trainer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Return ids and loss marks of the first micro-batch as the collator makes it, a row at a time, without padding.

    It is made anew from the order of rows: asking the data loader would draw random numbers.
    """
    order = islice(iter(trainer._get_train_sampler()), trainer.args.train_batch_size)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in order])
    marks = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    there = batch["attention_mask"] == 1 if "attention_mask" in batch else batch["input_ids"] >= 0
    for number, (ids, marked, kept) in enumerate(zip(batch["input_ids"], marks, there, strict=True)):
        begins = [0]
        if "position_ids" in batch:  # Rows packed into one sequence: each begins at position 0 again.
            begins = (batch["position_ids"][number] == 0).nonzero().flatten().tolist()
        for begin, end in pairwise([*begins, len(ids)]):
            of_row = kept[begin:end]
            yield ids[begin:end][of_row].tolist(), marked[begin:end][of_row].tolist()


def texts_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return what each token adds to the text; empty for one that begins what a later one completes."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]


def _described(ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase) -> ShownRow:
    kept = ids[:MAX_TOKENS]
    return ShownRow(kept, texts_of(kept, tokenizer), trained[:MAX_TOKENS], len(ids))
