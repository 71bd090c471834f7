"""Preference pairs: shapes of rows, both receipts, training, going on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.core.evidence.receipt import compare_rendering, load_receipt
from loraline.trainer.engines import loading, training
from loraline.trainer.preference_rows import parse_pair
from loraline.trainer.results import train_result
from loraline.trainer.rows import load_dataset
from loraline.trainer.testing import chat, harbour_pairs, harbour_rows, pair, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec

DPO: dict[str, Any] = {
    "objective": pb.OBJECTIVE_DPO,
    "epochs": 4,
    "learning_rate": 5e-3,
    "lora": pb.LoraParameters(r=4),
}
ASKED, AYE, NO = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [ASKED], "chosen": [AYE], "rejected": [NO]},
        {"chosen": [ASKED, AYE], "rejected": [ASKED, NO]},
        {"prompt": "Q", "chosen": [ASKED, AYE], "rejected": [ASKED, NO], "score_chosen": 9},
    ],
)
def test_pairs_are_read_in_the_shapes_that_people_have(row: dict[str, Any]) -> None:
    assert parse_pair(row) == ([ASKED, AYE], [ASKED, NO])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (chat("Q", "A"), "no chosen and rejected"),
        ({"chosen": "A", "rejected": "B"}, "no prompt"),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, "empty prompt"),
        (pair("Q", "A", " "), "no text as rejected"),
        (pair("Q", "A ", "A"), "same answer"),
        ({"prompt": [AYE], "chosen": "A", "rejected": "B"}, "nothing is asked"),
        ({"chosen": [ASKED, AYE], "rejected": [AYE, NO]}, "another prompt"),
        ({"prompt": "Q", "chosen": [ASKED], "rejected": "B"}, "no assistant message at the end of chosen"),
        ({"prompt": [{"role": "robot", "content": "Q"}], "chosen": "A", "rejected": "B"}, "no known role in prompt[0]"),
        (pair("Q", "A", 3), "no text as rejected"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_with_a_pair_is_told(row: dict[str, Any], said: str) -> None:
    assert said in str(parse_pair(row))


def test_bad_pairs_are_named_by_their_lines(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", [pair("Q", "A", "B"), chat("Q", "A"), "{", pair("Q", "A", "A")])
    with pytest.raises(LoralineError) as caught:
        load_dataset(rows, weight=1, pairs=True)
    assert caught.value.reason == "DATASET_ROWS_INVALID"
    assert list(caught.value.fields) == ["train.jsonl:2", "train.jsonl:3", "train.jsonl:4"]
    with pytest.raises(LoralineError) as caught:
        load_dataset(write_rows(tmp_path / "pairs", harbour_pairs(2)), weight=1)
    assert "OBJECTIVE_DPO" in caught.value.message


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("pairs") / "harbour", harbour_pairs())
    return write_rows(folder, harbour_pairs()[:4], "validation")


@pytest.fixture(scope="module")
def whole(
    small_base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[training.FinishedRun, Watcher]:
    watcher, work = Watcher(), tmp_path_factory.mktemp("whole")
    finished = training.run(inputs(small_base, pairs, pairs=True), spec(**DPO), work, watcher)
    assert finished is not None
    return finished, watcher


@pytest.mark.slow
def test_the_chosen_answers_gain_on_the_rejected(whole: tuple[training.FinishedRun, Watcher]) -> None:
    finished, watcher = whole
    assert finished.run.steps == 8
    first = next(entry for entry in finished.run.log if "loss" in entry)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # before the first step nothing is preferred
    assert finished.figures["loss"] < 0.5
    assert finished.figures["reward_accuracy"] == 1.0
    assert finished.figures["reward_margin"] > 0.3
    assert {"reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"} <= set(watcher.metrics[-1])
    assert "eval_loss" in finished.figures
    result = train_result(finished, pb.TrainResult().adapter, pb.BaseModel())
    assert result.preference.reward_accuracy == 1.0
    assert result.preference.rejected_receipt.rows == result.receipt.rows == 16


@pytest.mark.slow
def test_both_sides_have_a_receipt(whole: tuple[training.FinishedRun, Watcher]) -> None:
    folder = whole[0].folder
    tokenizer: Any = loading.load_tokenizer(folder)

    def render(messages: list[dict[str, str]]) -> list[int]:
        return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]

    for name, words in (("token_receipt.json", "Aye"), ("token_receipt_rejected.json", "No, never")):
        receipt = load_receipt(folder / name)
        assert (receipt.counts.rows, receipt.counts.rows_teaching_eos, receipt.counts.fully_masked_rows) == (16, 16, 0)
        assert compare_rendering(receipt, render) == []
        for row in receipt.rows:
            learned = [token for token, kept in zip(row.input_ids, row.labels_mask, strict=True) if kept]
            assert str(tokenizer.decode(learned)).startswith(words)
    assert "Rejected answers" in (folder / "README.md").read_text()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4


@pytest.mark.slow
def test_paused_and_resumed_it_ends_the_same(
    whole: tuple[training.FinishedRun, Watcher], small_base: Path, pairs: Path, tmp_path: Path
) -> None:
    run = inputs(small_base, pairs, pairs=True)
    assert training.run(run, spec(**DPO), tmp_path, Watcher(stop_at=3)) is None
    finished = training.run(run, spec(**DPO), tmp_path, Watcher())
    assert finished is not None
    # An epoch is two steps: the wish is heard before the evaluation at its end.
    assert finished.run.resumed_from == "checkpoint-2"
    assert digest(finished.folder) == digest(whole[0].folder)


@pytest.mark.slow
def test_a_tuned_adapter_is_its_own_reference(small_base: Path, pairs: Path, tmp_path: Path) -> None:
    """Answers first, preferences after: the first loss is that of no preference, so the reference is the adapter."""
    rows = write_rows(tmp_path / "rows", harbour_rows(8))
    first = training.run(inputs(small_base, rows), spec(max_steps=4), tmp_path / "first", Watcher())
    assert first is not None
    plain = inputs(small_base, pairs, pairs=True)
    warm = training.RunInputs(
        "next", plain.base, plain.datasets, 0.0, plain.dataset_names, first.folder, "adapter/a:v1"
    )
    asked = spec(**{**DPO, "epochs": 0, "max_steps": 4})
    assert training.run(warm, asked, tmp_path / "next", Watcher(stop_at=2)) is None
    finished = training.run(warm, asked, tmp_path / "next", Watcher())
    assert finished is not None
    losses = [entry["loss"] for entry in finished.run.log if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    # The copy of the first adapter, which the second is compared with, is no part of what comes out.
    assert not [path for path in finished.folder.iterdir() if path.is_dir()]
    assert digest(finished.folder) != digest(first.folder)
    straight = training.run(warm, asked, tmp_path / "straight", Watcher())
    assert straight is not None
    assert digest(straight.folder) == digest(finished.folder)


@pytest.mark.slow
def test_a_pair_goes_whole_where_one_side_is_too_long(small_base: Path, tmp_path: Path) -> None:
    long = pair("Where to?", "Aye.", "No, " + "never " * 200)
    rows = write_rows(tmp_path / "rows", [*harbour_pairs(8), long])
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, rows, pairs=True), spec(**DPO), tmp_path / "error", Watcher())
    assert (caught.value.reason, list(caught.value.fields)) == ("ROWS_TOO_LONG", ["train.jsonl:9"])
    asked = spec(**{**DPO, "epochs": 0, "max_steps": 2, "length_policy": pb.LENGTH_POLICY_DROP})
    finished = training.run(inputs(small_base, rows, pairs=True), asked, tmp_path / "drop", Watcher())
    assert finished is not None and finished.rejected is not None
    for receipt in (finished.receipt, finished.rejected):
        assert (receipt.counts.rows, receipt.counts.dropped_rows) == (8, 1)
