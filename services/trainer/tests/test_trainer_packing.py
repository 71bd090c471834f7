"""Packing: every row once, none sees another, and a run that packs learns and resumes like one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.engines import training
from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.packing import pack
from loraline.trainer.testing import chat, harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec


def rows_of(lengths: list[int]) -> list[EncodedRow]:
    return [EncodedRow(str(number), [], [number] * size, [1] * size) for number, size in enumerate(lengths)]


def test_every_row_is_packed_once_and_packs_are_full() -> None:
    rows = rows_of([10, 60, 30, 90, 40, 5, 55, 100, 70, 30])
    packs = pack(rows, 100)
    assert sorted(row.source for one in packs for row in one.rows) == sorted(row.source for row in rows)
    assert all(one.tokens <= 100 for one in packs)
    assert len(packs) == 5  # 490 tokens do not fit into fewer
    assert pack(rows, 100) == packs


def test_a_row_longer_than_the_packs_has_one_of_its_own() -> None:
    assert [one.tokens for one in pack(rows_of([7, 3, 4]), 5)] == [7, 4, 3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths."""
    rows = [chat(row["messages"][0]["content"] * (1 + number % 4), "Aye. " * (1 + number % 5))
            for number, row in enumerate(harbour_rows())]  # fmt: skip
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", rows)
    return write_rows(folder, rows[:4], "validation")


def run(base: Path, rows: Path, work: Path, watcher: Watcher | None = None, **asked: Any) -> training.FinishedRun:
    finished = training.run(inputs(base, rows), spec(**asked), work, watcher or Watcher())
    assert finished is not None
    return finished


@pytest.mark.slow
def test_packed_rows_have_the_loss_that_they_have_alone(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    """One step over all rows: were one row seen by the next, or its positions counted on, the loss would differ."""
    lora = pb.LoraParameters(r=4)  # no dropout, whose draws follow the shape of a batch
    one_step = {"max_steps": 1, "epochs": 0, "batch_size": 24, "eval_steps": 1, "warmup_ratio": 0.0, "lora": lora}
    alone = run(small_base, dataset, tmp_path / "alone", **one_step)
    packed = run(small_base, dataset, tmp_path / "packed", packing=True, **one_step)
    assert packed.run.log[0]["loss"] == pytest.approx(alone.run.log[0]["loss"], rel=2e-4)
    assert packed.run.log[0]["grad_norm"] == pytest.approx(alone.run.log[0]["grad_norm"], rel=2e-3)
    assert packed.run.tokens == alone.run.tokens == alone.receipt.counts.tokens
    losses = [finished.figures["eval_loss"] for finished in (alone, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.slow
def test_a_packed_run_that_was_paused_ends_the_same(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"packing": True, "batch_size": 2, "epochs": 2}
    whole = run(small_base, dataset, tmp_path / "whole", **asked)
    assert whole.run.tokens == 2 * whole.receipt.counts.tokens
    stop = Watcher(stop_at=whole.run.steps // 2)
    assert training.run(inputs(small_base, dataset), spec(**asked), tmp_path / "parts", stop) is None
    parts = run(small_base, dataset, tmp_path / "parts", **asked)
    assert parts.run.resumed_from
    assert digest(parts.folder) == digest(whole.folder)
