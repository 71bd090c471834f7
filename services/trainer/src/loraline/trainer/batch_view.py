"""What a model was shown first, as a file beside a run's checkpoints and beside the weights that are published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loraline.api.trainer.v1 import trainer_pb2 as pb

FILE_NAME = "first_batch.json"


@dataclass(frozen=True)
class ShownRow:
    """A row as the model is shown it, without padding; the lists are of equal length."""

    token_ids: list[int]
    tokens: list[str]
    """Text that each token adds."""
    trained: list[bool]
    """Whether it carries loss."""
    length: int
    """Tokens of the whole row, more than are kept of a long one."""


def save_rows(rows: Sequence[ShownRow], file: Path) -> None:
    """Write the rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": 1, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def load_rows(file: Path) -> list[pb.BatchRow]:
    """Return the rows of a file; none where it is missing or torn."""
    try:
        return [pb.BatchRow(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
