"""Near duplicates: which pairs are found by their exact Jaccard index, in three scripts and in families of variants."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from loraline.datagen.quality.rules.near import KEPT_HASHES, NearDuplicatesRule, banding, shingles, similarity
from loraline.datagen.quality.seen import TRAIN, LineIndex, SeenRow

LETTERS = {"latin": "abcdefghijklmnopqrstuvwxyz", "hangul": "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허",
           "han": "".join(chr(0x4E00 + 7 * n) for n in range(400))}  # fmt: skip


def word(source: random.Random, letters: str) -> str:
    return "".join(source.choice(letters) for _ in range(source.randint(3, 9)))


def variant(source: random.Random, words: Sequence[str], letters: str, most: int) -> str:
    changed = list(words)
    for _ in range(source.randint(1, most)):
        changed[source.randrange(len(changed))] = word(source, letters)
    return " ".join(changed)


def jaccard(one: str, other: str) -> float:
    mine, theirs = set(shingles(one).tolist()), set(shingles(other).tolist())
    return len(mine & theirs) / len(mine | theirs)


def found(
    folder: Path, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch, similarity: float = 0.8
) -> set[int]:  # fmt: skip
    """Return the positions of the texts that are told as near duplicates."""
    index, rule = LineIndex(), NearDuplicatesRule(folder, similarity)
    monkeypatch.setattr("loraline.datagen.quality.tally.ROWS_SHOWN", 10**6)
    for number, text in enumerate(texts, start=1):
        row = SeenRow(TRAIN, index.number(TRAIN, number), {}, [{"role": "assistant", "content": text}])
        rule.see(row)
    return {number - 1 for finding in rule.findings(len(texts), index) for number in finding.numbers}


@pytest.mark.parametrize("script", ["latin", "hangul", "han"])
def test_pairs_above_the_bound_are_found_and_none_below(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, letters, texts = random.Random(f"near {script}"), LETTERS[script], []
    for _ in range(400):
        words = [word(source, letters) for _ in range(source.randint(15, 60))]
        texts += [" ".join(words), variant(source, words, letters, 4)]
    told = found(tmp_path, texts, monkeypatch)
    indices = {at: jaccard(texts[at - 1], texts[at]) for at in range(1, len(texts), 2)}
    above = {at for at, value in indices.items() if value >= 0.8}
    assert len(above) > 50 and len(indices) - len(above) > 50
    assert told <= above
    assert len(told) >= 0.98 * len(above)


def test_families_of_variants_are_found_however_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, letters, texts = random.Random("families"), LETTERS["latin"], []
    for _ in range(25):
        words = [word(source, letters) for _ in range(30)]
        texts += [variant(source, words, letters, 6) for _ in range(20)]
    source.shuffle(texts)
    hashes = [set(shingles(text).tolist()) for text in texts]
    truth = {
        at for at, mine in enumerate(hashes)
        if any(len(mine & other) >= 0.8 * len(mine | other) for other in hashes[:at])
    }  # fmt: skip
    told = found(tmp_path, texts, monkeypatch)
    assert told <= truth
    assert len(told) >= 0.95 * len(truth) > 40


def test_long_texts_are_compared_by_a_sample_of_their_hashes() -> None:
    source = np.random.default_rng(3)
    pool = source.choice(2**32, 12_000, replace=False).astype(np.uint32)
    one, other = np.sort(pool[:10_000]), np.sort(pool[1_000:11_000])
    exact = 9_000 / 11_000
    assert abs(similarity(one[:KEPT_HASHES], other[:KEPT_HASHES]) - exact) < 0.06
    assert similarity(one[:100], one[:100]) == 1.0 and similarity(one[:100], np.sort(pool[11_500:11_600])) == 0.0


def test_the_bands_of_a_similarity_bring_its_pairs_together() -> None:
    assert {banding(value) for value in (0.8, 0.85, 0.9, 1.0)} == {(18, 7)}
    lengths = [banding(percent / 100)[1] for percent in range(5, 81)]
    assert lengths == sorted(lengths) and lengths[0] == 1
    for percent in range(5, 101):
        bands, rows = banding(percent / 100)
        assert bands * rows <= 126
        assert 1 - (1 - (percent / 100) ** rows) ** bands >= 0.97


@pytest.mark.parametrize(("bound", "most"), [(0.5, 16), (0.6, 12), (0.7, 8)])
def test_a_lower_similarity_finds_its_pairs_and_none_below(
    tmp_path: Path, bound: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, letters, texts = random.Random(f"lower {bound}"), LETTERS["latin"], []
    for _ in range(600):
        words = [word(source, letters) for _ in range(source.randint(25, 55))]
        texts += [" ".join(words), variant(source, words, letters, most)]
    indices = {at: jaccard(texts[at - 1], texts[at]) for at in range(1, len(texts), 2)}
    above = {at for at, value in indices.items() if value >= bound}
    just_above = {at for at in above if indices[at] < min(bound + 0.1, 0.8)}
    assert len(just_above) > 80 and len(indices) - len(above) > 50
    told = found(tmp_path, texts, monkeypatch, bound)
    assert told <= above
    assert len(told & just_above) >= 0.97 * len(just_above)
    assert len(told) >= 0.98 * len(above)
