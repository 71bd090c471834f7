"""Rows: what a run refuses, by file and line; mixing by weight; validation rows that are never trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from loraline.core.errors import LoralineError
from loraline.trainer.rows import LoadedDataset, Row, load_dataset, load_rows, mix
from loraline.trainer.testing import chat, harbour_rows, write_rows


def test_every_bad_row_is_named_at_once(tmp_path: Path) -> None:
    rows = [
        chat("a", "b"),
        {"messages": [{"role": "user", "content": "alone"}]},
        "{broken",
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": 3}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
        chat("c", "d"),
    ]
    with pytest.raises(LoralineError) as caught:
        load_rows(write_rows(tmp_path, rows) / "train.jsonl")
    error = caught.value
    assert error.reason == "DATASET_ROWS_INVALID"
    assert list(error.fields) == [f"train.jsonl:{line}" for line in (2, 3, 4, 5, 6, 7)]
    assert "train.jsonl:2 has no assistant turn" in error.message
    assert error.metadata["rows"] == "6"


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path, [chat("a", "b"), "", chat("c", "d")]) / "train.jsonl", "x/")
    assert [row.source for row in rows] == ["x/train.jsonl:1", "x/train.jsonl:3"]


@pytest.mark.parametrize(("rows", "reason"), [([], "DATASET_EMPTY"), (None, "DATASET_FILE_MISSING")])
def test_nothing_to_train_on(tmp_path: Path, rows: list[str] | None, reason: str) -> None:
    if rows is not None:
        write_rows(tmp_path, rows)
    with pytest.raises(LoralineError) as caught:
        load_dataset(tmp_path, weight=1)
    assert caught.value.reason == reason


def dataset(name: str, count: int, weight: float, validation: int = 0) -> LoadedDataset:
    def rows(kind: str, number: int) -> list[Row]:
        return [Row(f"{name}/{kind}:{n}", chat(f"{name} {kind} {n}", "a")["messages"]) for n in range(number)]

    return LoadedDataset(rows("train", count), rows("validation", validation), weight)


def test_weights_oversample_and_the_seed_decides_the_order() -> None:
    parts = [dataset("talk", 10, 1), dataset("facts", 8, 2.5)]
    first, again, other = (mix(parts, validation_fraction=0, seed=seed) for seed in (3, 3, 4))
    assert [row.source for row in first.train] == [row.source for row in again.train]
    assert [row.source for row in first.train] != [row.source for row in other.train]
    counts = Counter(row.source for row in first.train)
    assert sum(count for source, count in counts.items() if source.startswith("facts")) == 20
    assert {counts[f"facts/train:{n}"] for n in range(8)} == {2, 3}
    assert {counts[f"talk/train:{n}"] for n in range(10)} == {1}
    assert first.unique_rows == 18


def test_validation_rows_are_never_trained_on() -> None:
    twins = dataset("talk", 20, 3)
    doubled = LoadedDataset(
        [*twins.train, *(Row(f"twin:{n}", row.messages) for n, row in enumerate(twins.train))], [], 3
    )
    mixture = mix([doubled], validation_fraction=0.2, seed=0)
    trained = {json.dumps(row.messages) for row in mixture.train}
    held_out = {json.dumps(row.messages) for row in mixture.validation}
    assert len(held_out) == 4
    assert not trained & held_out


def test_own_validation_rows_win_over_a_fraction() -> None:
    mixture = mix([dataset("talk", 10, 1, validation=2)], validation_fraction=0.5, seed=0)
    assert len(mixture.train) == 10
    assert [row.source for row in mixture.validation] == ["talk/validation:0", "talk/validation:1"]


def test_harbour_rows_load(harbour: Path) -> None:
    loaded = load_dataset(harbour, weight=0)
    assert (len(loaded.train), len(loaded.validation), loaded.weight) == (len(harbour_rows()), 4, 1.0)


def test_rows_of_two_datasets_never_take_each_others_place(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one", harbour_rows()[:3])
    two = write_rows(tmp_path / "two", harbour_rows()[3:6])
    with pytest.raises(ValueError, match=r"train\.jsonl:1"):
        mix([load_dataset(one, weight=1), load_dataset(two, weight=1)], validation_fraction=0, seed=0)
    labelled = [load_dataset(one, weight=1, label="one/"), load_dataset(two, weight=1, label="two/")]
    assert mix(labelled, validation_fraction=0, seed=0).unique_rows == 6
