"""Probes at the end of a run: the saved adapter is loaded anew onto the base, so that the files are what is proven."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loraline.core.errors import failed_precondition
from loraline.core.evidence.probes import Probe, ProbeSet
from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow, Messages
from loraline.trainer.engines.loading import Precision, load_model

MAX_RESPONSE_TOKENS = 24
MIN_SHIFT = 1e-3
"""Nats by which some token must differ between base and adapter; less means that the adapter does nothing."""
FIXED_PROMPTS = {"fixed-en": "Hello, how are you?", "fixed-zh": "你好，你是谁？"}
_TRAIN_PROBES, _VALIDATION_PROBES = 4, 2


def measure(
    base: Path,
    tuned: Path,
    encoder: ChatEncoder,
    train: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    *,
    seed: int,
    remote_code: bool = False,
    precision: Precision | None = None,
    device: str = "",
) -> ProbeSet:
    """Measure about eight probes under the base and under what was trained: the folder of an adapter, or of a model.

    In float32 unless another precision is given, on the GPU where there is one unless another device is named. Raises
    FAILED_PRECONDITION (ADAPTER_WITHOUT_EFFECT) when the training changed nothing; torch's error when memory runs out.
    """
    precision = precision or Precision("fp32", "none", "probes")
    device = device or default_device()
    prompts = _prompts(train, validation, seed)
    if (tuned / "adapter_config.json").is_file():
        adapted = PeftModel.from_pretrained(load_model(base, precision, remote_code=remote_code), str(tuned))
        model = _ready(adapted, precision, device)
        told = [_respond(model, encoder, *prompt) for prompt in prompts]
        with model.disable_adapter():
            before = [logprobs(model, one.prompt_ids, one.response_ids) for one in told]
    else:
        model = _ready(load_model(tuned, precision, remote_code=remote_code), precision, device)
        told = [_respond(model, encoder, *prompt) for prompt in prompts]
        del model  # two whole models need not be held at a time
        model = _ready(load_model(base, precision, remote_code=remote_code), precision, device)
        before = [logprobs(model, one.prompt_ids, one.response_ids) for one in told]
    probes = [replace(one, base_logprobs=figures) for one, figures in zip(told, before, strict=True)]
    plain = precision.quantization == "none"
    found = ProbeSet(str(precision.torch_dtype).removeprefix("torch.") if plain else precision.quantization, probes)
    if not found.max_shift >= MIN_SHIFT:
        message = (
            f"The training changes no log-probability by {MIN_SHIFT} nats or more: it did nothing. Raise "
            "parameters.learning_rate or parameters.epochs, and look at the token receipt's rows."
        )
        raise failed_precondition("ADAPTER_WITHOUT_EFFECT", message, max_shift=f"{found.max_shift:.2e}")
    return found


def default_device() -> str:
    """Return where probes are measured if there is room."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _ready(model: Any, precision: Precision, device: str) -> Any:
    model = model.eval()
    # A quantised model is where it was loaded.
    return model.to(device) if precision.quantization == "none" else model


def _respond(model: Any, encoder: ChatEncoder, name: str, prompt: Messages, response: str | None) -> Probe:
    """Return a probe with the tuned model's figures; the base's are still missing."""
    prompt_ids = encoder.render(prompt, prompt=True)
    response_ids = _response_ids(model, encoder, prompt, prompt_ids, response)
    return Probe(name, prompt, prompt_ids, response_ids, [], logprobs(model, prompt_ids, response_ids))


def _prompts(
    train: Sequence[EncodedRow], validation: Sequence[EncodedRow], seed: int
) -> list[tuple[str, Messages, str | None]]:
    """Return (name, prompt, the row's answer or None for a greedy one)."""
    generator = random.Random(f"probes:{seed}")  # noqa: S311  (a draw, no secret)
    chosen: list[tuple[str, Messages, str | None]] = []
    for kind, rows, count in (("train", train, _TRAIN_PROBES), ("validation", validation, _VALIDATION_PROBES)):
        unique = list({row.source: row for row in rows}.values())
        for number, row in enumerate(generator.sample(unique, min(count, len(unique))), start=1):
            last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
            chosen.append((f"{kind}-{number}", row.messages[:last], row.messages[last]["content"]))
    for name, text in FIXED_PROMPTS.items():
        chosen.append((name, [{"role": "user", "content": text}], None))
    return [entry for entry in chosen if entry[1]]


def _response_ids(
    model: Any, encoder: ChatEncoder, prompt: Messages, prompt_ids: list[int], response: str | None
) -> list[int]:
    if response is not None:
        whole = encoder.render([*prompt, {"role": "assistant", "content": response}])
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :][:MAX_RESPONSE_TOKENS]
    ids = greedy(model, prompt_ids, encoder.eos_ids, MAX_RESPONSE_TOKENS)
    return ids or [min(encoder.eos_ids)]


@torch.inference_mode()
def logprobs(model: Any, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    """Return the log-probability of each response token after the prompt, in nats."""
    ids = torch.tensor([[*prompt_ids, *response_ids]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt_ids) :, None])
    return [float(value) for value in chosen[:, 0]]


@torch.inference_mode()
def greedy(model: Any, prompt_ids: list[int], eos_ids: frozenset[int], limit: int) -> list[int]:
    """Return the most likely continuation, up to and with an end-of-sequence token."""
    ids = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=sorted(eos_ids),
        pad_token_id=min(eos_ids),
    )
    return [int(token) for token in output[0, len(prompt_ids) :]]
