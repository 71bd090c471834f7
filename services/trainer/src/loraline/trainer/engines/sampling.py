"""The order of rows in an epoch, as a pure function of seed and epoch, so that a resumed run sees the same batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


def epoch_order(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[int]:
    """Return row numbers so that each batch holds rows of like length and the batches come shuffled."""
    generator = random.Random(f"{seed}:{epoch}")  # noqa: S311  (a shuffle, no secret)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    # Sorting within large windows keeps the batches random enough and almost free of padding.
    window = max(batch_size * 16, 1)
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda row: lengths[row])
        batches.extend(part[at : at + batch_size] for at in range(0, len(part), batch_size))
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) != batch_size]
    generator.shuffle(full)
    return [row for batch in [*full, *rest] for row in batch]


class EpochSampler(Sampler[int]):
    """Gives epoch_order for the epoch that the data loader announces."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.batch_size, seed=self.seed, epoch=self.epoch))

    def __len__(self) -> int:
        return len(self.lengths)
