"""Equal digests of many rows, found on disk: what memory is needed does not depend on how many rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

PARTS = 64
SPILL_BYTES = 64 * 1024
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])
Rows = npt.NDArray[np.uint64]


class DigestGroups:
    """Rows by digest. Records lie in PARTS files by the digest's first bits, and each part is sorted on its own.

    A part of a million rows is some 400 kB. Small datasets never touch the disk.
    """

    def __init__(self, folder: Path, name: str):
        self._paths = [folder / f"{name}-{part:02d}" for part in range(PARTS)]
        self._buffers = [bytearray() for _ in range(PARTS)]
        self.distinct = 0
        """How many different digests there are; known once groups() ran to its end."""

    def add(self, digest: bytes, row: int) -> None:
        """Take a row's digest of 16 bytes in."""
        part = digest[0] % PARTS
        buffer = self._buffers[part]
        buffer += digest
        buffer += row.to_bytes(8, "little")
        if len(buffer) >= SPILL_BYTES:
            self._spill(part)

    def add_many(self, records: npt.NDArray[np.void]) -> None:
        """Take records of type RECORD in."""
        order = np.argsort(records["high"] % PARTS, kind="stable")
        ordered = records[order]
        bounds = np.searchsorted(ordered["high"] % PARTS, np.arange(PARTS + 1))
        for part in range(PARTS):
            self._buffers[part] += ordered[bounds[part] : bounds[part + 1]].tobytes()
            if len(self._buffers[part]) >= SPILL_BYTES:
                self._spill(part)

    def _spill(self, part: int) -> None:
        with self._paths[part].open("ab") as file:
            file.write(self._buffers[part])
        self._buffers[part].clear()

    def groups(self) -> Iterator[Rows]:
        """Yield, for every digest that stands more than once, the numbers of its rows, ascending."""
        self.distinct = 0
        for part in range(PARTS):
            records = self._read(part)
            if not len(records):
                continue
            records = records[np.lexsort((records["row"], records["low"], records["high"]))]
            same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
            starts = np.flatnonzero(np.concatenate(([True], ~same)))
            self.distinct += len(starts)
            ends = np.append(starts[1:], len(records))
            for at in np.flatnonzero(ends - starts > 1):
                yield records["row"][starts[at] : ends[at]]

    def _read(self, part: int) -> npt.NDArray[np.void]:
        path, buffer = self._paths[part], bytes(self._buffers[part])
        spilled = path.read_bytes() if path.exists() else b""
        return np.frombuffer(spilled + buffer, dtype=RECORD)
