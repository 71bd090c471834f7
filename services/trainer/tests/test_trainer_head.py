"""The loss by the logits of the answers alone is the loss by all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from loraline.trainer.engines import head


@pytest.fixture(scope="module")
def model(small_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_base)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 300, (3, 20), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 15:] = 0
    labels = torch.full_like(ids, head.IGNORED)
    labels[0, 8:], labels[1, 12:15], labels[2, 3:5] = ids[0, 8:], ids[1, 12:15], ids[2, 3:5]
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


@pytest.mark.parametrize("tokens", [None, torch.tensor(40)])
def test_loss_and_gradient_are_those_of_all_logits(model: Any, tokens: torch.Tensor | None) -> None:
    inputs = batch()
    kept = head.answer_positions(inputs["labels"], 448)
    assert kept is not None
    assert kept.tolist() == [2, 3, *range(7, 19)]
    weight = model.get_input_embeddings().weight
    found = head.answer_loss(model, inputs, kept, tokens)
    (gradient,) = torch.autograd.grad(found.loss, weight)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    expected = cross_entropy(logits, labels, ignore_index=head.IGNORED, reduction="sum") / (tokens or 17)
    (wanted,) = torch.autograd.grad(expected, weight)
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-6)
    valid = labels != head.IGNORED
    assert found.accuracy == pytest.approx(float((logits[valid].argmax(-1) == labels[valid]).float().mean()))


def test_large_logits_and_batches_without_answers_are_left_to_trl(model: Any) -> None:
    labels = batch()["labels"]
    assert head.answer_positions(labels, 448) is not None
    assert head.answer_positions(labels, head.MAX_LOGITS_BYTES) is None
    assert head.answer_positions(torch.full_like(labels, head.IGNORED), 448) is None
    assert head.takes_positions(model)
    assert not head.takes_positions(torch.nn.Linear(2, 2))
