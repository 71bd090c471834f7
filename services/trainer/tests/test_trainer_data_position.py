"""A checkpoint knows the rows and their order that its epoch and step are counted in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loraline.trainer import checkpoints
from loraline.trainer.engines import training
from loraline.trainer.engines.data_position import FILE_NAME, data_position
from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.packing import Pack
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

ROWS = [EncodedRow(f"train.jsonl:{line}", [], [1, 2, line], [0, 1, 1]) for line in range(1, 5)]


def position(*units: EncodedRow | Pack, effective_batch: int = 4, seed: int = 0) -> str:
    return str(data_position(units, effective_batch=effective_batch, seed=seed))


def test_whatever_changes_the_order_or_the_tokens_shows() -> None:
    same = position(*ROWS)
    others = {
        position(*reversed(ROWS)),
        position(*ROWS[:3]),
        position(*ROWS[:3], replace(ROWS[3], mask=[0, 0, 1])),
        position(*ROWS[:3], replace(ROWS[3], rejected=ROWS[0])),
        position(Pack(ROWS[:2]), Pack(ROWS[2:])),
        position(Pack(ROWS[:1]), Pack(ROWS[1:])),
        position(*ROWS, effective_batch=8),
        position(*ROWS, seed=1),
    }
    assert len(others) == 8 and same not in others
    assert position(*[replace(row, source="elsewhere:1") for row in ROWS]) == same


@pytest.mark.slow
def test_going_on_with_other_rows_is_told(small_base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", harbour_rows())
    assert training.run(inputs(small_base, rows), spec(), tmp_path / "work", Watcher(stop_at=3)) is None
    newest, _ = checkpoints.newest_good(tmp_path / "work" / "checkpoints")
    assert newest is not None and (newest / FILE_NAME).is_file()
    same = Watcher(stop_at=5)
    assert training.run(inputs(small_base, rows), spec(), tmp_path / "work", same) is None
    assert "RESUME_DATA_CHANGED" not in same.notes
    write_rows(rows, list(reversed(harbour_rows())))
    other = Watcher(stop_at=7)
    assert training.run(inputs(small_base, rows), spec(), tmp_path / "work", other) is None
    assert "RESUME_DATA_CHANGED" in other.notes
