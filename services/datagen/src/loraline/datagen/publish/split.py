"""Which rows validate: seeded, and rows with equal prompts stay on one side."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

DEFAULT_FRACTION = 0.05
DIGEST_BYTES = 16

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def validation_rows(prompts: bytes | bytearray, fraction: float, seed: int) -> Mask:
    """Return, for every row, whether it goes to validation; `prompts` are the rows' digests of 16 bytes, end to end.

    Validation rows are `fraction` of all as nearly as whole groups of equal prompts allow without going above it; at
    least one row with two different prompts or more and a fraction above 0; never all. The choice depends on the
    prompts and the seed alone, not on the order of the rows. Needs some 50 bytes a row for as long as it runs.
    """
    digests = np.frombuffer(prompts, dtype=[("high", "<u8"), ("low", "<u8")])
    group_of, firsts, sizes = _groups(digests)
    if fraction <= 0 or len(sizes) < 2:
        return np.zeros(len(digests), dtype=bool)
    chosen = _choose(_seeded_order(prompts, firsts, seed), sizes, max(1, round(fraction * len(digests))))
    return chosen[group_of]


def _groups(digests: npt.NDArray[np.void]) -> tuple[Counts, Counts, Counts]:
    """Return each row's group, and each group's first row in sorted order and size."""
    order = np.lexsort((digests["low"], digests["high"]))
    ordered = digests[order]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    group_of = np.empty(len(ordered), dtype=np.int64)
    group_of[order] = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    return group_of, order[starts], np.diff(np.append(starts, len(ordered)))


def _seeded_order(prompts: bytes | bytearray, firsts: Counts, seed: int) -> Counts:
    """Return the groups in an order that the seed and their prompts decide."""
    salt = str(seed).encode() + b":"
    keys = np.empty(len(firsts), dtype=">u8")
    view = memoryview(prompts)
    for group, row in enumerate(firsts):
        digest = view[int(row) * DIGEST_BYTES : (int(row) + 1) * DIGEST_BYTES]
        keys[group] = int.from_bytes(hashlib.sha256(salt + digest).digest()[:8], "big")
    return np.argsort(keys, kind="stable")


def _choose(order: Counts, sizes: Counts, wanted: int) -> Mask:
    """Return which groups are taken, in the order given, up to `wanted` rows; never all, and one at least."""
    chosen = np.zeros(len(sizes), dtype=bool)
    taken = groups = 0
    for group in order:
        size = int(sizes[group])
        if taken + size <= wanted and groups < len(sizes) - 1:
            chosen[group] = True
            taken, groups = taken + size, groups + 1
        if taken == wanted:
            break
    if not groups:  # Every group is larger than the share: the smallest one, first in the seeded order.
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen
