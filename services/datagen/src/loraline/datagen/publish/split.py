"""Which rows validate: seeded, and rows with equal prompts stay on one side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

DEFAULT_FRACTION = 0.05


def validation_prompts(prompts: Sequence[bytes], fraction: float, seed: int) -> frozenset[bytes]:
    """Return the prompt digests whose rows go to validation.

    Their rows are `fraction` of all as nearly as whole groups of equal prompts allow without going above it; at
    least one row with two different prompts or more and a fraction above 0; never all. The choice depends on the
    prompts and the seed alone, not on the order of the rows.
    """
    groups = Counter(prompts)
    if fraction <= 0 or len(groups) < 2:
        return frozenset()
    salt = str(seed).encode()
    order = sorted(groups, key=lambda digest: hashlib.sha256(salt + b":" + digest).digest())
    wanted = max(1, round(fraction * len(prompts)))
    chosen: set[bytes] = set()
    taken = 0
    for digest in order:
        if taken + groups[digest] <= wanted and len(chosen) < len(groups) - 1:
            chosen.add(digest)
            taken += groups[digest]
        if taken == wanted:
            break
    if not chosen:  # Every group is larger than the share: the smallest one, first in the seeded order.
        chosen.add(min(order, key=lambda digest: groups[digest]))
    return frozenset(chosen)
