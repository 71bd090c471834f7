"""The loss on a CPU: logits only where the batch carries loss, in one product.

TRL's own head computes them in chunks and once more for the gradient, which saves a GPU's memory and costs a CPU its
time. Here the logits of the positions that carry loss are kept as long as they are small; larger ones are left to TRL.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

MAX_LOGITS_BYTES = 256 * 1024 * 1024
"""Logits in float32 above which TRL's chunked head is used: about three such blocks are held at a time."""
IGNORED = -100


@dataclass(frozen=True)
class AnswerLoss:
    """Loss of a batch, and what it says of its tokens."""

    loss: torch.Tensor
    """Sum over the tokens that carry loss, divided by the number given; nats per token."""
    accuracy: float
    """Share of those tokens that are the most likely one."""


def takes_positions(model: Any) -> bool:
    """Whether the model gives logits of chosen positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def answer_positions(labels: torch.Tensor, vocabulary: int) -> torch.Tensor | None:
    """Return the positions whose next token carries loss in some row of the batch.

    None when their logits would be large, or when there are none.
    """
    kept = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    size = labels.shape[0] * kept.numel() * vocabulary * 4
    return kept if 0 < size <= MAX_LOGITS_BYTES else None


def answer_loss(model: Any, inputs: dict[str, Any], kept: torch.Tensor, tokens: Any) -> AnswerLoss:
    """Return the loss of a batch by the logits at `kept`; `tokens` is what the sum is divided by, None for its own."""
    labels = inputs["labels"][:, 1:][:, kept]
    given = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
    logits = model(**given, logits_to_keep=kept, use_cache=False).logits
    answers = labels != IGNORED
    logits, wanted = logits[answers].float(), labels[answers]
    total = cross_entropy(logits, wanted, reduction="sum")
    count = torch.as_tensor(wanted.numel() if tokens is None else tokens).clamp(min=1)
    hits = (logits.detach().argmax(dim=-1) == wanted).float().mean()
    return AnswerLoss(total / count, float(hits))
