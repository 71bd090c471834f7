"""The first batch as it is shown to people is the one that the model is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer import batch_view
from loraline.trainer.diagnosis.history import History, Point
from loraline.trainer.diagnosis.sign import Facts
from loraline.trainer.diagnosis.subject import Subject, diagnose
from loraline.trainer.engines import first_batch, training
from loraline.trainer.engines.loading import load_tokenizer
from loraline.trainer.engines.row_trainer import RowTrainer
from loraline.trainer.results import train_result
from loraline.trainer.runs import first_batch as of_run
from loraline.trainer.spec import resolve
from loraline.trainer.testing import chat, harbour_pairs, harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

MIXED = "Grüße 🙂 조수 潮声 <b>"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = [chat(f"{MIXED} {number}", f"Aye, {number} 🙂.") for number in range(4)] + harbour_rows(6)
    return write_rows(tmp_path / "rows", rows)


def run(base: Path, rows: Path, work: Path, *, pairs: bool = False, **asked: Any) -> training.FinishedRun:
    watcher = Watcher()
    finished = training.run(
        inputs(base, rows, pairs=pairs), spec(epochs=0, max_steps=4, warmup_ratio=0.0, **asked), work, watcher
    )
    assert finished is not None
    assert watcher.notes.index("FIRST_BATCH") > watcher.notes.index("TOKEN_RECEIPT")
    return finished


def rows_of(finished: training.FinishedRun) -> list[pb.BatchRow]:
    found = batch_view.load_rows(finished.folder / batch_view.FILE_NAME)
    for row in found:
        assert len(row.token_ids) == len(row.tokens) == len(row.trained) == row.length
    return found


def joined(row: pb.BatchRow, *, trained: bool) -> str:
    return "".join(text for text, carries in zip(row.tokens, row.trained, strict=True) if carries == trained)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_it_is_what_the_model_is_shown(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    compute = RowTrainer.compute_loss

    def looked_at(self: Any, model: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.append((batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()))
        return compute(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(RowTrainer, "compute_loss", looked_at)
    finished = run(small_base, dataset, tmp_path / "work", batch_size=3, packing=packing)
    rows = rows_of(finished)
    pad = load_tokenizer(small_base).pad_token_id
    ids, labels = seen[0]
    assert [token for row in rows for token in row.token_ids] == [token for token in ids if token != pad][
        : sum(row.length for row in rows)
    ]
    carried = {token for token, label in zip(ids, labels, strict=True) if label != -100}
    assert {t for row in rows for t, carries in zip(row.token_ids, row.trained, strict=True) if carries} <= carried
    texts = {message["content"] for line in (dataset / "train.jsonl").read_text().splitlines()
             for message in json.loads(line)["messages"] if message["role"] == "assistant"}  # fmt: skip
    for row in rows:
        answer = joined(row, trained=True)
        assert any(text in answer for text in texts), answer
        assert not any(text in joined(row, trained=False) for text in texts)
    assert list(train_result(finished, pb.TrainResult().adapter, pb.BaseModel()).first_batch) == rows


@pytest.mark.slow
def test_pairs_show_the_chosen_and_the_rejected_answer(small_base: Path, tmp_path: Path) -> None:
    pairs = harbour_pairs(6)
    rows = rows_of(
        run(
            small_base,
            write_rows(tmp_path / "pairs", pairs),
            tmp_path / "work",
            pairs=True,
            objective=pb.OBJECTIVE_DPO,
            batch_size=2,
        )
    )
    answers = [joined(row, trained=True) for row in rows]
    assert len(rows) == 4
    for kind, found in (("chosen", answers[:2]), ("rejected", answers[2:])):
        texts = [str(pair[kind][-1]["content"] if isinstance(pair[kind], list) else pair[kind]) for pair in pairs]
        assert all(any(text in answer for text in texts) for answer in found), (kind, found)


def test_tokens_spell_the_text_whatever_the_writing(small_base: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(small_base)
    ids = tokenizer(MIXED, add_special_tokens=False)["input_ids"]
    texts = first_batch.texts_of(ids, tokenizer)  # type: ignore[arg-type]
    assert "".join(texts) == MIXED
    assert "\ufffd" not in "".join(texts) and len(texts) == len(ids)


def test_a_long_row_is_cut_for_the_view_and_says_so(small_base: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    row = first_batch._described([5] * 2000, [True] * 2000, tokenizer)
    assert (len(row.token_ids), len(row.tokens), len(row.trained), row.length) == (512, 512, 512, 2000)


def test_a_run_shows_it_while_it_works_and_a_torn_file_shows_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "trainer-train-1"
    job = job_pb2.Job(name=folder.name)
    assert of_run(job, tmp_path) == []
    row = batch_view.ShownRow([7, 8], ["A", "<b>"], [False, True], 2)
    batch_view.save_rows([row], folder / batch_view.FILE_NAME)
    assert of_run(job, tmp_path) == [
        pb.BatchRow(token_ids=[7, 8], tokens=["A", "<b>"], trained=[False, True], length=2)
    ]
    points = tuple(Point(step, 1.0 / step) for step in range(1, 20))
    facts = Facts(first_batch=of_run(job, tmp_path))
    subject = Subject("Run x", History(points), facts, resolve(pb.TrainRequest()).parameters)
    page = diagnose(subject).html
    assert '<span title="7">A</span><mark title="8">&lt;b&gt;</mark>' in page
    assert "row 1: 2 tokens, 1 carry loss" in page
    for torn in ("", '{"rows": [{"token_ids": ["x"]}]}', '{"rows": 3}', '{"rows": [{"other": 1}]}'):
        (folder / batch_view.FILE_NAME).write_text(torn)
        assert of_run(job, tmp_path) == []
