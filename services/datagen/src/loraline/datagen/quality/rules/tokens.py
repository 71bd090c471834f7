"""Rows against the base model's tokenizer: what is cut off, and what it cannot write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import Faults, Rule, of_rows
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows

BATCH = 128
TURN_TOKENS = 5
"""What a chat template of the usual form (ChatML) adds to each turn: begin mark, role, line end, end mark, line end."""
SOUP_SHARE = 0.05
CHARACTERS_TOLD = 12
_WORD_BEGIN = frozenset({"▁", "Ġ"})


class TokensRule(Rule):
    """Lengths in tokens, truncation at max_length, unknown characters and letters written byte by byte.

    Lengths are those of the turns plus five tokens each for the chat template, an estimate within a few tokens of
    the trainer's own count. A letter is soup when the tokenizer needs two tokens or more for it alone.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._unknown = getattr(tokenizer.model, "unk_token", None)
        self._waiting: list[SeenRow] = []
        self._lengths: Counter[int] = Counter()
        self._characters: Counter[str] = Counter()
        self._first: dict[str, FirstRows] = {}
        self._faults = Faults()
        self._lost = self._longest = 0
        self._soup: list[str] = []

    def see(self, row: SeenRow) -> None:
        """Take one row in; rows are read by the tokenizer in batches."""
        self._waiting.append(row)
        if len(self._waiting) == BATCH:
            self._read()

    def _read(self) -> None:
        texts = [message["content"] for row in self._waiting for message in row.messages]
        lengths = iter([len(found) for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)])
        for row in self._waiting:
            counts = [(message["role"], next(lengths) + TURN_TOKENS) for message in row.messages]
            self._measure(row.number, counts)
            for message in row.messages:
                self._count_characters(message["content"], row.number)
        self._waiting.clear()

    def _measure(self, number: int, counts: list[tuple[str, int]]) -> None:
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
        self._faults.add("ANSWER_CUT_AWAY" if before >= self._max_length else "ROW_TRUNCATED", number)

    def _count_characters(self, text: str, number: int) -> None:
        for character, count in Counter(text).items():
            if not character.isascii():
                self._characters[character] += count
                first = self._first.setdefault(character, FirstRows())
                if first.count < 3:
                    first.add(number)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield truncation, unknown characters and soup."""
        self._read()
        cut = (
            f"longer than {self._max_length} tokens (the longest has {self._longest}); {self._lost} tokens of all rows "
        )
        cut += "would be cut off."
        for code, what in (
            ("ANSWER_CUT_AWAY", "prompts that leave no token of an answer, in rows "),
            ("ROW_TRUNCATED", ""),
        ):
            rows = self._faults.rows(code)
            if rows.count:
                yield of_rows(code, rows, total, what + cut)
        yield from self._odd_characters()

    def _odd_characters(self) -> Iterator[Finding]:
        characters = sorted(self._characters)
        unknown: list[str] = []
        for character, found in zip(characters, self._encoded(characters), strict=True):
            if self._unknown in found:
                unknown.append(character)
            elif len(found) > 1 and character.isalpha():
                self._soup.append(character)
        if unknown:
            yield self._about("UNKNOWN_CHARACTERS", unknown, "the tokenizer does not know")
        letters = sum(count for character, count in self._characters.items() if character.isalpha())
        soup = sum(self._characters[character] for character in self._soup)
        if soup and soup >= SOUP_SHARE * letters:
            share = f"the tokenizer writes byte by byte ({100 * soup / letters:.0f} % of the letters beyond ASCII)"
            yield self._about("BYTE_SOUP", self._soup, share)

    def _encoded(self, characters: list[str]) -> Iterator[list[str]]:
        """Yield each character's tokens, without the mark of a word's begin that some tokenizers put first."""
        for begin in range(0, len(characters), 1024):
            batch = characters[begin : begin + 1024]
            for found in self._tokenizer.encode_batch(batch, add_special_tokens=False):
                yield [token for token in found.tokens if token not in _WORD_BEGIN]

    def _about(self, code: str, characters: list[str], what: str) -> Finding:
        often = sorted(characters, key=lambda character: (-self._characters[character], character))[:CHARACTERS_TOLD]
        shown = " ".join(f"{c} ({self._characters[c]} times)" for c in often)
        numbers = sorted({number for character in often for number in self._first[character].numbers})
        return Finding(code, f"{len(characters)} characters that {what}: {shown}.", len(numbers), numbers=numbers)

    def figures(self) -> dict[str, Any]:
        """Return the lengths in tokens."""
        return {"tokens": self._lengths, "max_length": self._max_length}
