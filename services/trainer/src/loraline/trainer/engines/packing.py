"""Packing: several rows in one sequence, each with positions of its own, so that none attends to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loraline.trainer.engines.encoding import EncodedRow


@dataclass(frozen=True)
class Pack:
    """Rows that are shown together."""

    rows: list[EncodedRow]

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(len(row.input_ids) for row in self.rows)


def pack(rows: Sequence[EncodedRow], max_length: int) -> list[Pack]:
    """Return the rows in as few sequences as best-fit decreasing finds; the same rows give the same packs."""
    room: dict[int, list[list[EncodedRow]]] = {}
    packs: list[list[EncodedRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        left = min((free for free, found in room.items() if free >= size and found), default=None)
        if left is None:
            chosen: list[EncodedRow] = []
            packs.append(chosen)
            left = max(max_length, size)
        else:
            chosen = room[left].pop()
        chosen.append(row)
        room.setdefault(left - size, []).append(chosen)
    return [Pack(found) for found in packs]


def pack_dataset(packs: Sequence[Pack]) -> Dataset:
    """Return the packs as columns; `seq_lengths` says where a row ends."""
    return Dataset.from_dict(
        {
            "input_ids": [[token for row in one.rows for token in row.input_ids] for one in packs],
            "labels": [[label for row in one.rows for label in row.labels] for one in packs],
            "seq_lengths": [[len(row.input_ids) for row in one.rows] for one in packs],
        }
    )


def pack_collator(pad_token_id: int) -> DataCollatorForLanguageModeling:
    """Return what makes one sequence of a batch, with positions that begin anew with each row."""
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)
