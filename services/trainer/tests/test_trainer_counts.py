"""What the token receipt counts: rows with and without repetitions, and what is left out for its length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.evidence.receipt import ReceiptCounts, TokenReceipt, load_receipt
from loraline.trainer.diagnosis.history import History, Point
from loraline.trainer.diagnosis.judging import judge
from loraline.trainer.diagnosis.sign import Sign, facts_of
from loraline.trainer.engines.encoding import ChatEncoder, eos_ids_of
from loraline.trainer.engines.lengths import LengthRule
from loraline.trainer.engines.preferences import prepare_pairs
from loraline.trainer.engines.preparing import left_out, prepare
from loraline.trainer.results import receipt_summary
from loraline.trainer.rows import LoadedDataset, Row, mix
from loraline.trainer.testing import chat
from loraline.trainer.testing_templates import FAMILIES, tokenizer


def encoder() -> ChatEncoder:
    made = tokenizer(FAMILIES["chatml"], marks=True)
    return ChatEncoder(made, eos_ids_of(made, None))


def rows(count: int, *, name: str = "train", words: int = 1, turns: int = 1) -> list[Row]:
    said = [chat(f"Who? {'far ' * words}", f"Aye {number}")["messages"] * turns for number in range(count)]
    return [Row(f"{name}.jsonl:{line}", messages) for line, messages in enumerate(said, start=1)]


def sign(receipt: TokenReceipt, *codes: str) -> Sign:
    """Return the sign with one of these codes that a finished run with this receipt gets."""
    history = History(tuple(Point(step, 0.2, 0.96, 1e-4, 1.0) for step in range(1, 21)), (), 1.0)
    result = pb.TrainResult(receipt=receipt_summary(receipt))
    return next(sign for sign in judge(history, facts_of(result)).signs if sign.code in codes)


def test_rows_shown_five_times_are_not_five_times_the_rows() -> None:
    mixture = mix([LoadedDataset(rows(120), [], 5)], validation_fraction=0, seed=0)
    counts = prepare(mixture, encoder(), LengthRule(200), allow_unlearned_eos=False).receipt.counts
    assert (counts.rows, counts.unique_rows) == (600, 120)
    receipt = TokenReceipt("", "", 0, counts)
    assert sign(receipt, "ROWS", "FEW_ROWS").message.startswith("There are 120 rows")
    assert "600 of 600" in sign(receipt, "EOS_TAUGHT").message


def test_pieces_of_a_row_are_one_row() -> None:
    mixture = mix([LoadedDataset(rows(3, turns=6), [], 2)], validation_fraction=0, seed=0)
    counts = prepare(mixture, encoder(), LengthRule(90, "split"), allow_unlearned_eos=False).receipt.counts
    assert counts.rows > 6
    assert (counts.split_rows, counts.unique_rows) == (6, 3)


def test_rows_of_earlier_releases_are_all_that_is_known() -> None:
    receipt = TokenReceipt("", "", 0, ReceiptCounts(rows=900, rows_teaching_eos=900, trained_tokens=9000))
    assert sign(receipt, "ROWS", "FEW_ROWS").message == "There are 900 rows."


def test_receipts_of_earlier_releases_are_read(tmp_path: Path) -> None:
    file = TokenReceipt("", "", 0, ReceiptCounts(rows=2, unique_rows=1)).save(tmp_path)
    assert load_receipt(file).counts.unique_rows == 1
    content = json.loads(file.read_text())
    for later in ("unique_rows", "dropped_validation_rows", "split_rows"):
        del content["counts"][later]
    file.write_text(json.dumps(content))
    assert load_receipt(file).counts == ReceiptCounts(rows=2)


@pytest.mark.parametrize(
    ("long", "dropped", "told"),
    [(1, (1, 1), "1 validation rows are"), (5, (5, 1), "5 rows of an epoch (31%)")],
)
def test_what_is_left_out_for_its_length_is_counted_and_told(long: int, dropped: tuple[int, int], told: str) -> None:
    training = [*rows(11), *rows(long, name="long", words=90)]
    validation = [*rows(2, name="validation"), *rows(1, name="much", words=90)]
    mixture = mix([LoadedDataset(training, validation, 1)], validation_fraction=0, seed=0)
    data = prepare(mixture, encoder(), LengthRule(200, "drop"), allow_unlearned_eos=False)
    counts = data.receipt.counts
    assert (counts.dropped_rows, counts.dropped_validation_rows) == dropped
    assert (len(data.train), len(data.validation)) == (11, 2)
    assert told in left_out(counts, 0.1) and "max_length" in left_out(counts, 0.1)


def test_validation_pairs_that_are_left_out_are_counted() -> None:
    def pairs(name: str, count: int, words: int) -> list[Row]:
        said = [chat(f"Who? {'far ' * words}", f"No {number}")["messages"] for number in range(count)]
        better = rows(count, name=name, words=words)
        return [Row(row.source, row.messages, other) for row, other in zip(better, said, strict=True)]

    loaded = LoadedDataset(pairs("train", 3, 1), [*pairs("validation", 2, 1), *pairs("much", 1, 90)], 1)
    mixture = mix([loaded], validation_fraction=0, seed=0)
    data = prepare_pairs(mixture, encoder(), LengthRule(200), allow_unlearned_eos=False)
    assert data.receipt.counts.dropped_validation_rows == 1


def test_nothing_left_out_is_nothing_told() -> None:
    mixture = mix([LoadedDataset(rows(4), rows(1, name="validation"), 1)], validation_fraction=0, seed=0)
    counts = prepare(mixture, encoder(), LengthRule(200, "drop"), allow_unlearned_eos=False).receipt.counts
    assert left_out(counts, 0.1) == ""
