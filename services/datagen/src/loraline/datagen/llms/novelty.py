"""Instructions seen so far: to show some to the model, and to turn down what is too like one of them."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections import deque
from collections.abc import Sequence

COMPARED = 500
KEPT = 5000
TOO_LIKE = 0.7


class InstructionPool:
    """The newest instructions, given ones first. Memory is bounded."""

    def __init__(self, given: Sequence[str]):
        self._given = list(dict.fromkeys(given))
        self._made: deque[str] = deque(maxlen=KEPT)
        self._shingles: deque[frozenset[int]] = deque(maxlen=COMPARED)
        for text in self._given[:COMPARED]:
            self._shingles.append(shingles(text))

    def add(self, text: str) -> None:
        """Take an accepted instruction in."""
        self._made.append(text)
        self._shingles.append(shingles(text))

    def too_like(self, text: str) -> bool:
        """Return whether one of the newest instructions is nearly this one (Jaccard of character trigrams)."""
        mine = shingles(text)
        return any(
            len(mine & other) >= TOO_LIKE * len(mine | other)
            for other in self._shingles
            if TOO_LIKE * len(mine) <= len(other) <= len(mine) / TOO_LIKE
        )

    def draw(self, seed: str, count: int) -> list[str]:
        """Return up to `count` different instructions; about a third of them made in this run once there are some."""
        draw = random.Random(hashlib.sha256(seed.encode()).digest())  # noqa: S311 - reproducible draws, no secrets
        made = draw.sample(list(self._made), min(len(self._made), count if not self._given else max(1, count // 3)))
        given = draw.sample(self._given, min(len(self._given), count - len(made)))
        drawn = [*given, *made]
        draw.shuffle(drawn)
        return drawn


def shingles(text: str) -> frozenset[int]:
    """Return digests of a text's character trigrams; width of white space and case do not count."""
    plain = " ".join(text.casefold().split())
    return frozenset(zlib.crc32(plain[at : at + 3].encode()) for at in range(max(1, len(plain) - 2)))
