"""Rows against the base model's tokenizer: what is cut off, and what it cannot write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import RowRule, of_rows
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import ROWS_SHOWN, Frequent

BATCH = 128
TURN_TOKENS = 5
"""What a chat template of the usual form (ChatML) adds to each turn: begin mark, role, line end, end mark, line end."""
SOUP_SHARE = 0.05
CHARACTERS_TOLD = 12
SHARES_LOST = ((0.1, "up to a tenth"), (0.25, "up to a quarter"), (0.5, "up to half"), (1.0, "more than half"))


class Cut:
    """The rows that lose most to max_length, and how many lose how much."""

    def __init__(self) -> None:
        self.worst: list[tuple[int, int, int]] = []
        """Row number, its length and what it loses in tokens; most first."""
        self._shares: Counter[str] = Counter()
        self._places: list[str] = []

    def add(self, length: int, number: int, most: int) -> None:
        """Take a row in that is longer than `most` tokens."""
        lost = length - most
        share = next(name for bound, name in SHARES_LOST if lost <= bound * length)
        self._shares[share] += 1
        self.worst.append((number, length, lost))
        self.worst.sort(key=lambda row: (-row[2], row[0]))
        del self.worst[ROWS_SHOWN:]

    def place(self, index: LineIndex) -> None:
        """Find the places of the rows; once, when all are there."""
        self._places = [index.place(number) for number, _, _ in self.worst]

    def told(self) -> dict[str, Any]:
        """Return rows by the share that they lose, and those that lose most."""
        rows = zip(self._places, self.worst, strict=False)
        return {
            "rows_by_share_lost": {name: self._shares[name] for _, name in SHARES_LOST if self._shares[name]},
            "worst": [{"row": place, "tokens": length, "lost": lost} for place, (_, length, lost) in rows],
        }  # fmt: skip


class TokensRule(RowRule):
    """Lengths in tokens, truncation at max_length, unknown characters and letters written byte by byte.

    Lengths are those of the turns plus five tokens each for the chat template, an estimate within a few tokens of
    the trainer's own count. A letter is soup where the tokenizer needs two tokens or more for it.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self._tokenizer, self._max_length = tokenizer, max_length
        self._unknown = getattr(tokenizer.model, "unk_token", None)
        self._waiting: list[SeenRow] = []
        self._lengths: Counter[int] = Counter()
        self._odd = {"UNKNOWN_CHARACTERS": Frequent(), "BYTE_SOUP": Frequent()}
        self._letters = 0
        self._lost = self._longest = 0
        self._cut = Cut()

    def see(self, row: SeenRow) -> None:
        """Take one row in; rows are read by the tokenizer in batches."""
        self._waiting.append(row)
        if len(self._waiting) == BATCH:
            self._read()

    def _read(self) -> None:
        texts = [message["content"] for row in self._waiting for message in row.messages]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        for row in self._waiting:
            for code in self._codes_of(row, encoded):
                self._faults.add(code, row.number)
        self._waiting.clear()

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row; byte soup is a matter of the whole dataset."""
        texts = [message["content"] for message in row.messages]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        yield from ((code, "") for code in self._codes_of(row, encoded) if code != "BYTE_SOUP")

    def _codes_of(self, row: SeenRow, encoded: Iterator[Any]) -> list[str]:
        """Return what is wrong with a row, whose turns are next among the encoded texts."""
        counts: list[tuple[str, int]] = []
        odd: set[str] = set()
        for message in row.messages:
            found = next(encoded)
            counts.append((message["role"], len(found) + TURN_TOKENS))
            if not message["content"].isascii():
                odd |= self._see_characters(message["content"], found, row.number)
        return [*self._measure(counts, row.number), *sorted(odd)]

    def _measure(self, counts: list[tuple[str, int]], number: int) -> Iterator[str]:
        length = sum(count for _, count in counts)
        self._lengths[length] += 1
        self._longest = max(self._longest, length)
        if not self._max_length or length <= self._max_length:
            return
        before = 0
        for role, count in counts:
            if role == "assistant":
                break
            before += count
        self._lost += length - self._max_length
        self._cut.add(length, number, self._max_length)
        yield "ANSWER_CUT_AWAY" if before >= self._max_length else "ROW_TRUNCATED"

    def _see_characters(self, text: str, encoded: Any, number: int) -> set[str]:
        """Count characters without a token of their own; return the codes of what was found."""
        found: set[str] = set()
        self._letters += sum(char.isalpha() for char in text if char > "\x7f")
        before = told = (-1, -1)
        for token, span in zip(encoded.tokens, encoded.offsets, strict=True):
            if token == self._unknown:
                found.add("UNKNOWN_CHARACTERS")
                for char in text[span[0] : span[1]]:
                    self._odd["UNKNOWN_CHARACTERS"].add(char, number)
            elif span == before and span != told and span[1] - span[0] == 1 and text[span[0]].isalpha():
                self._odd["BYTE_SOUP"].add(text[span[0]], number)
                told = span
                found.add("BYTE_SOUP")
            before = span
        return found

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield truncation, unknown characters and soup."""
        self._read()
        worst = ", ".join(f"{index.place(row)} loses {lost} of {length}" for row, length, lost in self._cut.worst[:3])
        cut = (
            f"longer than {self._max_length} tokens (the longest has {self._longest}); {self._lost} tokens of all rows "
            f"would be cut off: {worst}."
        )
        self._cut.place(index)
        for code, what in (
            ("ANSWER_CUT_AWAY", "prompts that leave no token of an answer, in rows "),
            ("ROW_TRUNCATED", ""),
        ):
            rows = self._faults.rows(code)
            if rows.count:
                yield of_rows(code, rows, total, what + cut)
        yield from self._odd_characters(total)

    def _odd_characters(self, total: int) -> Iterator[Finding]:
        for code, what in (
            ("UNKNOWN_CHARACTERS", "characters that the tokenizer does not know"),
            ("BYTE_SOUP", "letters that the tokenizer writes byte by byte"),
        ):
            rows, odd = self._faults.rows(code), self._odd[code]
            if rows.count and (code != "BYTE_SOUP" or odd.total >= SOUP_SHARE * self._letters):
                often = " ".join(f"{char} ({times.count})" for char, times in odd.top(CHARACTERS_TOLD))
                yield of_rows(
                    code, rows, total, f"{what}, {odd.total} of {self._letters} beyond ASCII; mostly {often}."
                )

    def figures(self) -> dict[str, Any]:
        """Return the lengths in tokens."""
        return {"tokens": self._lengths, "max_length": self._max_length, "truncated": self._cut.told()}
