"""Which rows a run sees, and in which order: a checkpoint's epoch and step mean nothing with other ones."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.packing import Pack

FILE_NAME = "data_position.json"
_VERSION = 1


@dataclass(frozen=True)
class DataPosition:
    """What the order of rows is a function of, beside the epoch and the step in trainer_state.json."""

    rows_sha256: str
    """Digest of every row's tokens and mask, in the order in which they are numbered."""
    effective_batch: int
    """Rows of an optimizer step."""
    seed: int

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint that is not sealed yet."""
        content = {"version": _VERSION, **asdict(self)}
        (checkpoint / FILE_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def changed_since(self, checkpoint: Path) -> str:
        """Return what differs from a checkpoint's, for people; empty when nothing does, or the checkpoint has none."""
        try:
            content = json.loads((checkpoint / FILE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:  # written by an earlier release
            return ""
        except (OSError, ValueError):
            return f"{FILE_NAME} cannot be read"
        now = asdict(self)
        names = {"rows_sha256": "the rows", "effective_batch": "the rows of a step", "seed": "the seed"}
        return ", ".join(told for name, told in names.items() if content.get(name) != now[name])


def data_position(units: Sequence[EncodedRow | Pack], *, effective_batch: int, seed: int) -> DataPosition:
    """Return the position's constants of rows, pairs, or packs of rows."""
    digest = hashlib.sha256()
    for unit in units:
        rows = unit.rows if isinstance(unit, Pack) else [unit]
        digest.update(array("q", [len(rows)]).tobytes())
        for row in rows:
            _add(digest, row)
    return DataPosition(digest.hexdigest(), effective_batch, seed)


def _add(digest: hashlib._Hash, row: EncodedRow) -> None:
    digest.update(array("q", [len(row.input_ids), *row.input_ids, *row.mask]).tobytes())
    if row.rejected is not None:
        _add(digest, row.rejected)
