"""Near duplicates by MinHash and locality-sensitive hashing, with everything that grows kept on disk."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from loraline.datagen.quality.digests import RECORD, DigestGroups, Rows
from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import Rule, of_rows
from loraline.datagen.quality.scripts import mostly_han
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.tally import FirstRows

PERMUTATIONS = 128
BANDS = 16
BAND_ROWS = PERMUTATIONS // BANDS
SHINGLE, HAN_SHINGLE = 5, 3
FEWEST_SHINGLES = 16
LONGEST_TEXT = 20_000
BATCH = 512
CHUNK = 4096
_PRIME = 1_000_003
_MIX = np.uint64(0x9E3779B97F4A7C15)
_POWERS = [np.uint64(pow(_PRIME, power, 2**64)) for power in range(SHINGLE)]
# One odd multiplier for each row of a band: equal sums are equal bands but for one in 2**64.
_BAND_FACTORS = np.array([pow(_PRIME, row + 1, 2**64) | 1 for row in range(BAND_ROWS)], dtype=np.uint64)
_SKETCH = np.dtype([("digest", "<u8"), ("values", "<u4", (PERMUTATIONS,))])


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


class NearDuplicatesRule(Rule):
    """Rows that share `similarity` of their n-grams (estimated Jaccard index) with an earlier row.

    16 bands of 8 values (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4) find a pair at 0.8 with a
    probability of 95 %, at 0.9 of 99.99 %; a pair counts when its 128 values agree to that share, whose standard
    error at 0.8 is 0.035. Rows of fewer than 16 n-grams are left out: two short greetings are similar by nature.
    """

    def __init__(self, folder: Path, similarity: float) -> None:
        self._similarity = similarity
        self._hash = MinHash(PERMUTATIONS, scheme="affine32", hashfunc=int)
        self._bands = DigestGroups(folder, "band")
        self._sketches = folder / "sketches"
        self._file: BinaryIO = self._sketches.open("wb")
        self._places: list[int] = []
        self._batch = np.zeros(BATCH, dtype=_SKETCH)
        self._written = 0
        self._near, self._leaking = FirstRows(), FirstRows()

    def see(self, row: SeenRow) -> None:
        """Sketch one row."""
        hashes = shingles("\n".join(m["content"] for m in row.messages if m["role"] != "system"))
        if len(hashes) < FEWEST_SHINGLES:
            return
        self._hash.clear()
        self._hash.update_batch(hashes.tolist())
        at = len(self._places)
        self._batch[at]["digest"] = int.from_bytes(row.digest[:8], "little")
        self._batch[at]["values"] = self._hash.hashvalues
        self._places.append(row.number)
        if at + 1 == BATCH:
            self._flush()

    def _flush(self) -> None:
        """Write the batch's sketches, and its bands with the sketches' positions."""
        count = len(self._places)
        sketches = self._batch[:count]
        bands = sketches["values"].reshape(count, BANDS, BAND_ROWS).astype(np.uint64)
        records = np.zeros(count * BANDS, dtype=RECORD)
        sums = ((bands * _BAND_FACTORS).sum(axis=2) * _MIX).reshape(-1)
        records["high"] = (sums >> np.uint64(32)) ^ sums
        records["low"] = np.tile(np.arange(BANDS, dtype=np.uint64), count)
        records["row"] = np.repeat(np.arange(self._written, self._written + count, dtype=np.uint64), BANDS)
        self._bands.add_many(records)
        self._file.write(_place_column(self._places, sketches))
        self._written += count
        self._places.clear()

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Compare the rows that share a band, each with the first of its group."""
        self._flush()
        self._file.close()
        flagged = np.zeros(self._written, dtype=bool)
        with self._sketches.open("rb") as file:
            for group in self._bands.groups():
                for begin in range(0, len(group), CHUNK):
                    chunk = group[begin : begin + CHUNK]
                    waiting = chunk[~flagged[chunk]]
                    self._compare(file, int(group[0]), waiting[waiting > group[0]], flagged, index)
        self._sketches.unlink()
        if self._near.count:
            yield of_rows("NEAR_DUPLICATES", self._near, total)
        if self._leaking.count:
            yield of_rows("NEAR_LEAKAGE", self._leaking, total)

    def _compare(
        self, file: BinaryIO, first: int, others: Rows, flagged: npt.NDArray[np.bool_], index: LineIndex
    ) -> None:
        if not len(others):
            return
        anchor = _read(file, first)
        for at in others:
            other = _read(file, int(at))
            same = np.count_nonzero(anchor["sketch"]["values"] == other["sketch"]["values"]) / PERMUTATIONS
            if same < self._similarity or anchor["sketch"]["digest"] == other["sketch"]["digest"]:
                continue
            flagged[at] = True
            self._near.add(int(other["row"]))
            if index.is_validation(int(other["row"])) and not index.is_validation(int(anchor["row"])):
                self._leaking.add(int(other["row"]))

    def figures(self) -> dict[str, Any]:
        """Return how many rows nearly repeat others."""
        return {"duplicates": {"near duplicates": self._near.count}}


_STORED = np.dtype([("row", "<u8"), ("sketch", _SKETCH)])


def _place_column(places: list[int], sketches: npt.NDArray[np.void]) -> bytes:
    stored = np.zeros(len(places), dtype=_STORED)
    stored["row"] = places
    stored["sketch"] = sketches
    return stored.tobytes()


def _read(file: BinaryIO, position: int) -> Any:
    file.seek(position * _STORED.itemsize)
    return np.frombuffer(file.read(_STORED.itemsize), dtype=_STORED)[0]
