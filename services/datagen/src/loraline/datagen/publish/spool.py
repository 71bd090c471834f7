"""Takes rows in one at a time, onto disk, and writes a dataset's files from them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from loraline.datagen.digest_set import DigestSet
from loraline.datagen.publish.split import DIGEST_BYTES, validation_rows
from loraline.datagen.rows import Row, prompt_digest, row_digest

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"


@dataclass
class Lengths:
    """Lengths in characters, as a histogram, so that a million rows need no million figures."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, length: int) -> None:
        """Count one."""
        self.counts[length] += 1

    def summary(self) -> dict[str, float]:
        """Return smallest, median, mean, 95th percentile and largest; empty without any."""
        total = self.counts.total()
        if not total:
            return {}
        mean = sum(length * count for length, count in self.counts.items()) / total
        return {"min": min(self.counts), "median": self.percentile(0.5), "mean": round(mean, 1),
                "p95": self.percentile(0.95), "max": max(self.counts)}  # fmt: skip

    def percentile(self, share: float) -> int:
        """Return the smallest length that `share` (0 to 1) of all do not exceed; there must be one at least."""
        position = share * self.counts.total()
        passed = 0
        for length in sorted(self.counts):
            passed += self.counts[length]
            if passed >= position:
                return length
        return max(self.counts)


@dataclass
class RowStatistics:
    """What the data card tells about the rows."""

    by_kind: Counter[str] = field(default_factory=Counter)
    by_rule: Counter[str] = field(default_factory=Counter)
    by_format: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    prompt_characters: Lengths = field(default_factory=Lengths)
    answer_characters: Lengths = field(default_factory=Lengths)

    def add(self, row: Row, source: str) -> None:
        """Count one row of the named source."""
        self.by_kind[row.kind] += 1
        self.by_rule[row.rule] += 1
        self.by_format[row.format] += 1
        self.by_source[source] += 1
        for message in row.messages:
            if message["role"] == "assistant":
                self.answers += 1
                self.answer_characters.add(len(message["content"]))
            elif message["role"] == "user":
                self.prompt_characters.add(len(message["content"]))


class RowSpool:
    """Rows on their way into a dataset. Memory grows with some 32 bytes a row; the texts go to disk."""

    def __init__(self, folder: Path, *, drop_duplicates: bool):
        self._path = folder / "rows.jsonl"
        self._file: TextIO = self._path.open("w", encoding="utf-8", newline="\n")
        self._drop = drop_duplicates
        self._seen = DigestSet()
        self._prompts = bytearray()
        self.statistics = RowStatistics()
        self.outcomes: Counter[str] = Counter()

    def has(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a row of these messages would be left out as an exact duplicate."""
        return self._drop and row_digest(messages) in self._seen

    def add(self, row: Row, source: str, *, count: bool = True) -> bool:
        """Take a row in; False when it is left out as an exact duplicate, which is counted unless `count` is off."""
        if self._drop and not self._seen.add(row_digest(row.messages)):
            self.outcomes["duplicate"] += count
            return False
        self._file.write(row.to_line() + "\n")
        self._prompts += prompt_digest(row.messages)
        self.statistics.add(row, source)
        self.outcomes["accepted"] += 1
        return True

    def __len__(self) -> int:
        return len(self._prompts) // DIGEST_BYTES

    def write(self, folder: Path, fraction: float, seed: int) -> tuple[int, int]:
        """Write train.jsonl and, unless empty, validation.jsonl into the folder; return their row counts."""
        self._file.close()
        validates = validation_rows(self._prompts, fraction, seed)
        counts = {TRAIN: 0, VALIDATION: 0}
        with _open_new(folder / TRAIN) as train, _open_new(folder / VALIDATION) as validation:
            for line, chosen in zip(self._lines(), validates, strict=True):
                name, out = (VALIDATION, validation) if chosen else (TRAIN, train)
                out.write(line)
                counts[name] += 1
            for out in (train, validation):
                out.flush()
                os.fsync(out.fileno())
        if not counts[VALIDATION]:
            (folder / VALIDATION).unlink()
        return counts[TRAIN], counts[VALIDATION]

    def close(self) -> None:
        """Remove the rows from disk."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[str]:
        with self._path.open(encoding="utf-8", newline="\n") as lines:
            yield from lines


def _open_new(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")
