"""Templates of many families, with and without generation marks: the mask is the answers with their ends."""

from __future__ import annotations

import re

import pytest

from loraline.core.evidence.receipt import compare_rendering
from loraline.trainer.engines.encoding import ChatEncoder, eos_ids_of
from loraline.trainer.engines.lengths import LengthRule
from loraline.trainer.engines.preparing import prepare
from loraline.trainer.engines.row_trainer import row_dataset
from loraline.trainer.rows import Mixture, Row
from loraline.trainer.testing_templates import FAMILIES, Family, tokenizer

ANSWERS = ("Aye 1, 潮声作证 🙂👩‍👩‍👧", "누구세요? Aye, 밤바다 — ﷽ é")
TURNS = [
    {"role": "system", "content": "Be kind, 温柔一点。"},
    {"role": "user", "content": "Who are you? 你是谁 🌊"},
    {"role": "assistant", "content": ANSWERS[0]},
    # The same words as the first answer, said by the user: they carry no loss.
    {"role": "user", "content": ANSWERS[0]},
    {"role": "assistant", "content": ANSWERS[1]},
]
families = pytest.mark.parametrize("name", FAMILIES)
marked = pytest.mark.parametrize("marks", [True, False], ids=["marks", "none"])


def encoder(family: Family, *, marks: bool, pad: str | None = None) -> ChatEncoder:
    made = tokenizer(family, marks=marks, pad=pad)
    ends = made.convert_tokens_to_ids(family.end)
    assert isinstance(ends, int)
    return ChatEncoder(made, eos_ids_of(made, [ends]))


def turns(family: Family) -> list[dict[str, str]]:
    return TURNS if family.system else TURNS[1:]


def spans(made: ChatEncoder, ids: list[int], mask: list[int]) -> list[str]:
    found: list[list[int]] = []
    for index, kept in enumerate(mask):
        if kept and (index == 0 or not mask[index - 1]):
            found.append([])
        if kept:
            found[-1].append(ids[index])
    return [str(made.tokenizer.decode(span)) for span in found]


@families
@marked
def test_answers_and_their_ends_carry_loss_and_nothing_else(name: str, marks: bool) -> None:
    family = FAMILIES[name]
    made = encoder(family, marks=marks)
    assert made.method == ("generation_marks" if marks else "prefix_difference")
    row = made.encode("train.jsonl:1", turns(family))
    # Blanks that a template puts around an answer belong to it; otherwise it is the answer, then its end.
    for span, answer in zip(spans(made, row.input_ids, row.mask), ANSWERS, strict=True):
        assert re.fullmatch(rf" ?{re.escape(answer)} ?{re.escape(family.end)}", span), span
    # What was said comes back whole, in every script.
    whole = str(made.tokenizer.decode(row.input_ids))
    assert all(turn["content"] in whole for turn in turns(family))


@families
def test_marks_and_their_absence_give_the_same_tokens_and_the_same_mask(name: str) -> None:
    family = FAMILIES[name]
    one, other = (encoder(family, marks=marks).encode("x", turns(family)) for marks in (True, False))
    assert one.input_ids == other.input_ids
    assert one.mask == other.mask


@families
@marked
def test_the_end_is_learned_whatever_the_pad_token_is(name: str, marks: bool) -> None:
    """pad == EOS is what many people set; labels come from the mask, so that the end keeps its loss."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    family = FAMILIES[name]
    made = encoder(family, marks=marks, pad=family.end)
    short = [*turns(family)[:-2]]
    rows = [Row("train.jsonl:1", turns(family)), Row("train.jsonl:2", short)]
    data = prepare(Mixture(rows, [], 2), made, LengthRule(2048), allow_unlearned_eos=False)
    assert data.receipt.counts.rows_teaching_eos == 2
    assert data.receipt.eos_token_id == made.tokenizer.convert_tokens_to_ids(family.end)
    pad = made.tokenizer.pad_token_id
    assert isinstance(pad, int) and pad in made.eos_ids
    batch = DataCollatorForLanguageModeling(pad_token_id=pad)(list(row_dataset(data.train)))
    labels = batch["labels"].tolist()
    assert [row.count(data.receipt.eos_token_id) for row in labels] == [2, 1]
    begin = len(data.train[1].input_ids)
    assert set(labels[1][begin:]) == {-100}, "padding carries no loss"
    assert compare_rendering(data.receipt, made.render) == []


@families
@marked
def test_long_conversations_split_in_every_format(name: str, marks: bool) -> None:
    family = FAMILIES[name]
    made = encoder(family, marks=marks)
    talk = turns(family)
    head, pair = (talk[:1], talk[1:3]) if family.system else ([], talk[:2])
    one = len(made.encode("x", [*head, *pair]).input_ids)
    long = Row("train.jsonl:1", [*head, *pair * 6])
    data = prepare(Mixture([long], [], 1), made, LengthRule(int(one * 2.4), "split"), allow_unlearned_eos=False)
    assert len(data.train) > 1 and data.receipt.counts.split_rows == 1
    assert all(piece.messages[: len(head)] == head for piece in data.train)
    assert sum(len(spans(made, piece.input_ids, piece.mask)) for piece in data.train) == 6
    assert data.receipt.counts.rows_teaching_eos == len(data.train)
