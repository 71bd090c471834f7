"""Near duplicates by MinHash and locality-sensitive hashing, with everything that grows kept on disk."""

from __future__ import annotations

import os
import unicodedata
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from loraline.datagen.quality.digests import RECORD, DigestGroups, Rows
from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import Rule, of_rows
from loraline.datagen.quality.scripts import mostly_han
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows

BAND_ROWS = 7
PERMUTATIONS = 18 * BAND_ROWS
USUAL_SIMILARITY, RECALL = 0.8, 0.97
KEPT_HASHES = 512
"""Of longer texts the smallest so many hashes are compared (a bottom-k sketch); of others all."""
ANCHORS = 8
SHINGLE, HAN_SHINGLE = 5, 3
FEWEST_SHINGLES = 16
LONGEST_TEXT = 20_000
BATCH = 512
_PRIME = 1_000_003
_MIX = np.uint64(0x9E3779B97F4A7C15)
_POWERS = [np.uint64(pow(_PRIME, power, 2**64)) for power in range(SHINGLE)]
# One odd multiplier for each row of a band: equal sums are equal bands but for one in 2**64.
_BAND_FACTORS = np.array([pow(_PRIME, row + 1, 2**64) | 1 for row in range(BAND_ROWS)], dtype=np.uint64)
_HEAD = np.dtype([("digest", "<u8"), ("row", "<u8"), ("signature", "<u4", (PERMUTATIONS,))])
LOOSE = 0.14
"""Rows whose signatures agree less than the similarity less this (four standard errors at 0.8) are not looked at."""


def banding(similarity: float) -> tuple[int, int]:
    """Return how many bands of how many values bring pairs of a similarity together.

    18 of 7 from 0.8 on; below, the longest bands by which a pair at the similarity meets with a probability of 97 %.
    """
    if similarity >= USUAL_SIMILARITY:
        return PERMUTATIONS // BAND_ROWS, BAND_ROWS
    for rows in range(BAND_ROWS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


def loose(similarity: float) -> float:
    """Return LOOSE; below 0.8 four standard errors of a signature at the similarity."""
    return LOOSE if similarity >= USUAL_SIMILARITY else 4 * (similarity * (1 - similarity) / PERMUTATIONS) ** 0.5


def shingles(text: str) -> npt.NDArray[np.uint32]:
    """Return the hashes of a text's character n-grams, each once: 3 characters for Han, 5 for other scripts.

    Width, case and white space do not count. Five is the usual length for Korean and for languages with letters; three
    Han characters carry as much.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text[:LONGEST_TEXT]).casefold().split())
    length = HAN_SHINGLE if mostly_han(plain) else SHINGLE
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < length:
        return np.empty(0, dtype=np.uint32)
    sums = codes[length - 1 :].copy()
    for back in range(1, length):
        sums += codes[length - 1 - back : len(codes) - back] * _POWERS[back]
    return np.unique(((sums * _MIX) >> np.uint64(32)).astype(np.uint32))


class Sketch(NamedTuple):
    """What is kept of a row: its place in the file, eight bytes of its digest, its number, and its MinHash signature.

    The smallest hashes of its n-grams, sorted, are read when they are needed.
    """

    position: int
    digest: int
    row: int
    signature: npt.NDArray[np.uint32]


def similarity(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> float:
    """Return the Jaccard index of two sets of hashes: exact up to KEPT_HASHES each, else estimated within some 0.02."""
    common = np.intersect1d(one, other, assume_unique=True)
    if max(len(one), len(other)) < KEPT_HASHES:
        return len(common) / (len(one) + len(other) - len(common))
    smallest = np.union1d(one, other)[:KEPT_HASHES]
    return float(np.isin(smallest, common, assume_unique=True).sum()) / len(smallest)


class NearDuplicatesRule(Rule):
    """Rows that share `similarity` of their n-grams (Jaccard index) with an earlier row.

    18 bands of 7 values (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4) bring a pair at 0.8 together
    with a probability of 98.6 %, at 0.85 of 99.9 %; for a lower `similarity` the bands are more and shorter. Rows that
    come together are compared by all their n-grams. In a band a row is compared with the first rows that are unlike
    each other, eight at most. Rows of fewer than 16 n-grams are left out: two short greetings are similar by nature.
    benchmarks/datagen/quality.py measures how many pairs are found.
    """

    def __init__(self, folder: Path, similarity: float) -> None:
        self._similarity = similarity
        self._banding = banding(similarity)
        self._fewest_agreeing = (similarity - loose(similarity)) * PERMUTATIONS
        self._hash = MinHash(PERMUTATIONS, scheme="affine32", hashfunc=int)
        self._bands = DigestGroups(folder, "band")
        self._sketches = folder / "sketches"
        self._file: BinaryIO = self._sketches.open("wb")
        self._ends = array("Q", [0])
        self._batch = np.zeros((BATCH, PERMUTATIONS), dtype=np.uint64)
        self._waiting = 0
        self._near, self._leaking = FirstRows(), FirstRows()

    def see(self, row: SeenRow) -> None:
        """Sketch one row."""
        hashes = shingles("\n".join(m["content"] for m in row.messages if m["role"] != "system"))
        if len(hashes) < FEWEST_SHINGLES:
            return
        self._hash.clear()
        self._hash.update_batch(hashes.tolist())
        self._batch[self._waiting] = self._hash.hashvalues
        kept = hashes[:KEPT_HASHES].tobytes()
        head = row.digest[:8] + row.number.to_bytes(8, "little") + self._hash.hashvalues.astype("<u4").tobytes()
        self._file.write(head + kept)
        self._ends.append(self._ends[-1] + _HEAD.itemsize + len(kept))
        self._waiting += 1
        if self._waiting == BATCH:
            self._flush()

    def _flush(self) -> None:
        """Take in the bands of the rows that wait, with the positions of their sketches."""
        count, end = self._waiting, len(self._ends) - 1
        bands, width = self._banding
        values = self._batch[:count, : bands * width].reshape(count, bands, width)
        records = np.zeros(count * bands, dtype=RECORD)
        sums = ((values * _BAND_FACTORS[:width]).sum(axis=2) * _MIX).reshape(-1)
        records["high"] = (sums >> np.uint64(32)) ^ sums
        records["low"] = np.tile(np.arange(bands, dtype=np.uint64), count)
        records["row"] = np.repeat(np.arange(end - count, end, dtype=np.uint64), bands)
        self._bands.add_many(records)
        self._waiting = 0

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Compare the rows that share a band."""
        self._flush()
        self._file.close()
        flagged = np.zeros(len(self._ends) - 1, dtype=bool)
        with self._sketches.open("rb") as file:
            for group in self._bands.groups():
                self._compare(file.fileno(), group, flagged, index)
        self._sketches.unlink()
        if self._near.count:
            yield of_rows("NEAR_DUPLICATES", self._near, total)
        if self._leaking.count:
            yield of_rows("NEAR_LEAKAGE", self._leaking, total)

    def _compare(self, file: int, group: Rows, flagged: npt.NDArray[np.bool_], index: LineIndex) -> None:
        anchors = [self._read(file, int(group[0]))]
        signatures = np.zeros((ANCHORS, PERMUTATIONS), dtype=np.uint32)
        signatures[0] = anchors[0].signature
        for position in group[1:]:
            at = int(position)
            if flagged[at]:
                continue
            other = self._read(file, at)
            agreeing = (signatures[: len(anchors)] == other.signature).sum(axis=1)
            near = np.flatnonzero(agreeing >= self._fewest_agreeing)
            anchor = next((anchors[one] for one in near if self._alike(file, anchors[one], other)), None)
            if anchor is None:
                if len(anchors) < ANCHORS:
                    signatures[len(anchors)] = other.signature
                    anchors.append(other)
            elif anchor.digest != other.digest:  # equal rows are exact duplicates, and told as such
                flagged[at] = True
                self._near.add(other.row)
                if index.is_validation(other.row) and not index.is_validation(anchor.row):
                    self._leaking.add(other.row)

    def _alike(self, file: int, anchor: Sketch, other: Sketch) -> bool:
        alike = similarity(self._hashes(file, anchor.position), self._hashes(file, other.position))
        return alike >= self._similarity

    def _read(self, file: int, position: int) -> Sketch:
        stored = os.pread(file, _HEAD.itemsize, self._ends[position])
        digest, row = int.from_bytes(stored[:8], "little"), int.from_bytes(stored[8:16], "little")
        return Sketch(position, digest, row, np.frombuffer(stored, dtype=np.uint32, offset=16))

    def _hashes(self, file: int, position: int) -> npt.NDArray[np.uint32]:
        begin = self._ends[position] + _HEAD.itemsize
        return np.frombuffer(os.pread(file, self._ends[position + 1] - begin, begin), dtype=np.uint32)

    def figures(self) -> dict[str, Any]:
        """Return how many rows nearly repeat others."""
        return {"duplicates": {"near duplicates": self._near.count}}
