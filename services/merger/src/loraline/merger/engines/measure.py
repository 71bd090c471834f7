"""Compares the log-probabilities of base+adapter with those of the merged model as written.

Both are computed in float32 by default, so that the figures show what the merge changed, not how a device rounds.
Reference and merged model are never in memory together: the reference's log-probabilities wait in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from loraline.core.errors import failed_precondition
from loraline.merger.engines.models import attach_adapters, load_causal_lm
from loraline.merger.texts import MeasuredText

_TOP = 10
"""Likeliest tokens of base+adapter, besides the text's own token, whose log-probabilities are compared."""


@dataclass(frozen=True)
class Measurement:
    """Figures of one comparison, in nats; see MergeMeasurement in the contract."""

    subject: str
    tokens: int
    mean_kl: float
    max_kl: float
    max_abs_logprob_diff: float
    top1_agreement: float
    base_to_adapter_diff: float


@dataclass
class Reference:
    """Log-probabilities of base+adapter on the texts, and how far they are from the base's."""

    path: Path
    vocabulary: int
    texts: Sequence[MeasuredText]
    base_to_adapter_diff: float = 0.0
    own_logprobs: list[list[float]] = field(default_factory=list)
    """Log-probability of each measured token of each text."""

    def blocks(self) -> Iterator[tuple[MeasuredText, torch.Tensor]]:
        """Yield each text with its rows of log-probabilities."""
        row = 0
        for text in self.texts:
            count = len(text.measured)
            shape = (count, self.vocabulary)
            part = numpy.memmap(self.path, numpy.float32, "r", row * self.vocabulary * 4, shape)
            yield text, torch.from_numpy(numpy.array(part))
            row += count


def compute_reference(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    texts: Sequence[MeasuredText],
    path: Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    check: Callable[[], None] = lambda: None,
    prepare: Callable[[Any], None] = lambda model: None,
) -> Reference:
    """Run base and base+adapter over the texts; the latter's log-probabilities go to `path`.

    Without adapters the reference is the model itself. `prepare` may change the loaded base, such as dequantise it.
    """
    loaded = load_causal_lm(base, dtype)
    prepare(loaded)
    model = attach_adapters(loaded, adapters) if adapters else loaded
    _require_tokens(model, texts, merging=bool(adapters))
    reference = Reference(path, 0, texts)
    with path.open("wb") as file:
        for text in texts:
            check()
            with_adapter = text_logprobs(model, text)
            reference.vocabulary = with_adapter.shape[1]
            if adapters:
                with model.disable_adapter():
                    plain = text_logprobs(model, text)
                difference = greatest_difference(with_adapter, plain, own_ids(text))
                reference.base_to_adapter_diff = max(reference.base_to_adapter_diff, difference)
            reference.own_logprobs.append(with_adapter.gather(1, own_ids(text)[:, None])[:, 0].tolist())
            file.write(with_adapter.numpy().tobytes())
    return reference


def _require_tokens(model: Any, texts: Sequence[MeasuredText], *, merging: bool) -> None:
    """Refuse evidence of another vocabulary; on a GPU such an id ends in a device-side assert.

    FAILED_PRECONDITION: ADAPTER_OF_ANOTHER_BASE where an adapter is merged, else TOKEN_ID_OUT_OF_RANGE, as the evidence
    then lies in the model's own folder.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for text in texts:
        wrong = next((number for number in text.ids if not 0 <= number < rows), None)
        if wrong is None:
            continue
        if merging:
            raise failed_precondition(
                "ADAPTER_OF_ANOTHER_BASE",
                f"The adapter's evidence ({text.name}) has token id {wrong}, the base has {rows} rows of embeddings. "
                "Merge into the base it was trained on.",
                text=text.name,
                token_id=str(wrong),
            )
        raise failed_precondition(
            "TOKEN_ID_OUT_OF_RANGE",
            f"The model's evidence ({text.name}) has token id {wrong}, its embedding has {rows} rows. "
            "Receipt or probes in its folder, or its tokenizer, are of another model: merge it again.",
            text=text.name,
            token_id=str(wrong),
        )


def measure_folder(
    folder: Path,
    reference: Reference,
    subject: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    check: Callable[[], None] = lambda: None,
    gguf_file: str = "",
) -> Measurement:
    """Load the merged folder as written, or one GGUF file in it, and compare it with the reference.

    Raises FAILED_PRECONDITION (MODEL_NOT_LOADABLE, MERGE_NOT_FINITE).
    """
    model = load_causal_lm(folder, dtype, gguf_file=gguf_file)
    divergences: list[torch.Tensor] = []
    greatest, same = 0.0, 0
    for text, expected in reference.blocks():
        check()
        found = text_logprobs(model, text)
        if found.shape != expected.shape:
            raise failed_precondition(
                "VOCAB_SIZE_MISMATCH",
                f"The merged model answers over {found.shape[1]} tokens, base+adapter over {expected.shape[1]}.",
            )
        divergences.append((expected.exp() * (expected - found)).sum(1).clamp_min(0))
        greatest = max(greatest, greatest_difference(expected, found, own_ids(text)))
        same += int((expected.argmax(1) == found.argmax(1)).sum())
    kl = torch.cat(divergences)
    if not bool(torch.isfinite(kl).all()):
        raise failed_precondition(
            "MERGE_NOT_FINITE",
            f"{subject}: the merged model answers with undefined probabilities; nothing is published.",
        )
    return Measurement(
        subject, len(kl), float(kl.mean()), float(kl.max()), greatest, same / len(kl), reference.base_to_adapter_diff
    )


@torch.inference_mode()
def text_logprobs(model: Any, text: MeasuredText) -> torch.Tensor:
    """Return the log-probabilities over the vocabulary at the places that predict the measured tokens, in float32."""
    logits = model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
    rows = logits[torch.tensor([position - 1 for position in text.measured])]
    return torch.log_softmax(rows.float(), dim=1).clone()


def own_ids(text: MeasuredText) -> torch.Tensor:
    """Return the ids of the measured tokens."""
    return torch.tensor([text.ids[position] for position in text.measured])


def greatest_difference(expected: torch.Tensor, found: torch.Tensor, own: torch.Tensor) -> float:
    """Return the greatest difference, in nats, at the text's own tokens and at the likeliest of `expected`.

    Not over the whole vocabulary: at tokens of probability e-30 a difference of a nat means nothing.
    """
    likeliest = expected.topk(min(_TOP, expected.shape[1]), dim=1).indices
    places = torch.cat([own[:, None], likeliest], dim=1)
    difference = (expected.gather(1, places) - found.gather(1, places)).abs().max()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")
