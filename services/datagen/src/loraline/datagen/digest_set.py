"""A set of digests in as little memory as Python allows: some 16 bytes each."""

from __future__ import annotations

from array import array

_FIRST_SLOTS = 1024


class DigestSet:
    """Remembers digests by their first 8 bytes, with open addressing.

    Two different digests are taken for one with a probability of n**2 / 2**65 among n: 3 in 100 million for a million.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Remember a digest; False when it was remembered before."""
        key = int.from_bytes(digest[:8], "little") or 1  # Zero marks an empty slot.
        at = self._find(key)
        if self._slots[at]:
            return False
        self._slots[at] = key
        self._count += 1
        if self._count * 3 > len(self._slots) * 2:
            self._grow()
        return True

    def __contains__(self, digest: bytes) -> bool:
        return bool(self._slots[self._find(int.from_bytes(digest[:8], "little") or 1)])

    def _find(self, key: int) -> int:
        """Return the slot of the key, or the empty one where it belongs."""
        slots, mask = self._slots, len(self._slots) - 1
        at = key & mask
        while (held := slots[at]) and held != key:
            at = (at + 1) & mask
        return at

    def _grow(self) -> None:
        held = self._slots
        self._slots = array("Q", bytes(16 * len(held)))
        for key in held:
            if key:
                self._slots[self._find(key)] = key
