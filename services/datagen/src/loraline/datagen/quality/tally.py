"""Counting what is found, with the first rows of each kind, in memory that does not grow with the dataset."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

ROWS_SHOWN = 20
CAPACITY = 10_000


class FirstRows:
    """How many rows, and the smallest row numbers among them."""

    def __init__(self) -> None:
        self.count = 0
        self._largest_first: list[int] = []

    def add(self, number: int) -> None:
        """Take a row in, in any order, each once."""
        self.count += 1
        if len(self._largest_first) < ROWS_SHOWN:
            heapq.heappush(self._largest_first, -number)
        elif number < -self._largest_first[0]:
            heapq.heapreplace(self._largest_first, -number)

    def extend(self, numbers: Iterable[int]) -> None:
        """Take rows in."""
        for number in numbers:
            self.add(int(number))

    @property
    def numbers(self) -> list[int]:
        """The smallest numbers, ascending."""
        return sorted(-number for number in self._largest_first)


class Frequent:
    """The most frequent values of a stream, with their first rows.

    Lossy counting (Manku and Motwani, VLDB 2002): after every CAPACITY values, those that were seen no more often than
    once in each such stretch are forgotten. A count is too low by at most one in CAPACITY of the stream, so a share
    of one per cent or more is never missed, and there are never many more than CAPACITY values in memory.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._rows: dict[str, FirstRows] = {}
        self._missed: Counter[str] = Counter()
        self.total = 0

    def add(self, value: str, number: int) -> None:
        """Count one value of a row."""
        self.total += 1
        rows = self._rows.get(value)
        if rows is None:
            rows = self._rows[value] = FirstRows()
            self._missed[value] = self.total // self._capacity
        rows.add(number)
        if self.total % self._capacity == 0:
            self._forget()

    def _forget(self) -> None:
        stretch = self.total // self._capacity
        for value in [value for value, rows in self._rows.items() if rows.count + self._missed[value] <= stretch]:
            del self._rows[value], self._missed[value]

    def top(self, count: int) -> list[tuple[str, FirstRows]]:
        """Return the most frequent values, most frequent first."""
        return heapq.nsmallest(count, self._rows.items(), key=lambda item: (-item[1].count, item[0]))
