"""How varied the answers' words, sentences and emoji are, on a sample of bounded size."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import regex

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import SHARES_NEED_ROWS, Rule, quoted
from loraline.datagen.quality.scripts import emoji_in
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows

SAMPLE_ROWS = 2000
SAMPLE_CHARACTERS = 1000
TOKENS = 10_000
FEWEST_TOKENS = 1000
LOW_DISTINCT_2 = 0.2
LOW_SENTENCES = 0.5
FEWEST_SENTENCES = 50
FEWEST_EMOJI = 20
EMOJI_SHARE = 0.6
_TOKEN = regex.compile(r"\p{Han}|[\p{L}\p{N}--\p{Han}]+", regex.V1)
_SENTENCE = regex.compile(r"[^.!?。！？…~～\n]+")


class VarietyRule(Rule):
    """Distinct word pairs, repeated sentences, and emoji.

    distinct-2 is the share of different word pairs among all pairs (Li et al., A Diversity-Promoting Objective
    Function, 2016); it falls as texts grow, so it is always taken from the first 10,000 words (Han characters) of
    the sample. Its bound of 0.2 and the others here are our own choice: the persona example has 0.5, rows from
    small pools are below 0.1.
    """

    def __init__(self) -> None:
        self._sample: list[tuple[int, str]] = []
        self._random = random.Random("quality sample")  # noqa: S311 - reproducible draws, no secrets
        self._rows = 0
        self._emoji: Counter[str] = Counter()
        self._with_emoji = FirstRows()
        self._figures: dict[str, Any] = {}

    def see(self, row: SeenRow) -> None:
        """Draw the row into the sample (Vitter's algorithm R) and count its emoji."""
        emoji = emoji_in(row.spoken)
        if emoji:
            self._emoji.update(emoji)
            self._with_emoji.add(row.number)
        self._rows += 1
        drawn = (row.number, row.spoken[:SAMPLE_CHARACTERS])
        if len(self._sample) < SAMPLE_ROWS:
            self._sample.append(drawn)
        elif (at := self._random.randrange(self._rows)) < SAMPLE_ROWS:
            self._sample[at] = drawn

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield what varies too little."""
        self._figures = {"emoji": dict(self._emoji.most_common(20)), "rows_with_emoji": self._with_emoji.count}
        if total < SHARES_NEED_ROWS:
            return
        yield from self._words()
        yield from self._sentences()
        yield from self._emoji_kinds()

    def _words(self) -> Iterator[Finding]:
        pairs: set[tuple[str, str]] = set()
        words = counted = 0
        for _, text in self._sample:
            tokens = _TOKEN.findall(text.casefold())
            pairs.update(pairwise(tokens))
            counted += max(0, len(tokens) - 1)
            words += len(tokens)
            if words >= TOKENS:
                break
        if not counted:
            return
        share = len(pairs) / counted
        self._figures["distinct_2"] = round(share, 3)
        if words >= FEWEST_TOKENS and share < LOW_DISTINCT_2:
            told = f"Of {counted} word pairs in a sample of the answers {100 * share:.0f} % are different."
            yield Finding("LOW_DISTINCT_N", told)

    def _sentences(self) -> Iterator[Finding]:
        sentences: Counter[str] = Counter()
        first: dict[str, FirstRows] = {}
        for number, text in self._sample:
            for sentence in {part.strip() for part in _SENTENCE.findall(text)}:
                if len(sentence) >= 4:
                    sentences[sentence] += 1
                    first.setdefault(sentence, FirstRows()).add(number)
        total = sentences.total()
        self._figures["distinct_sentences"] = round(len(sentences) / total, 3) if total else None
        if total >= FEWEST_SENTENCES and len(sentences) < LOW_SENTENCES * total:
            (most, count), *_ = sentences.most_common(1)
            told = f"Of {total} sentences in a sample of the answers {len(sentences)} are different; {quoted(most)} "
            yield Finding("LOW_SENTENCE_VARIETY", f"{told}stands in {count}.", count, numbers=first[most].numbers)

    def _emoji_kinds(self) -> Iterator[Finding]:
        total = self._emoji.total()
        if total < FEWEST_EMOJI:
            return
        most, count = self._emoji.most_common(1)[0]
        if count >= EMOJI_SHARE * total or len(self._emoji) < 3:
            told = f"{count} of {total} emoji are {most}; there are {len(self._emoji)} kinds."
            yield Finding("LOW_EMOJI_VARIETY", told, self._with_emoji.count, numbers=self._with_emoji.numbers)

    def figures(self) -> dict[str, Any]:
        """Return distinct-2, the share of different sentences, and the emoji."""
        return self._figures
