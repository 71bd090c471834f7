"""The toy base: Qwen2's architecture with about four million parameters, pretrained for a minute."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, set_seed

from loraline.core.errors import LoralineError, failed_precondition
from loraline.trainer.engines.tiny_tokenizer import save_tokenizer, train_tokenizer
from loraline.trainer.tiny.texts import corpus_dialogues

_EMBEDDING_DEVIATION = 0.2

Report = Callable[[int, int, float], None]
"""Called after every step with the step, the steps in all and the loss."""


@dataclass(frozen=True)
class TinyModelSettings:
    """How the toy base is made."""

    steps: int = 200
    """Pretraining steps."""
    vocab_size: int = 2048
    """Entries of the vocabulary at most."""
    seed: int = 0
    """Seed of initialisation and shuffling."""
    tokens_per_step: int = 512
    """Tokens in a step's batch, about."""
    learning_rate: float = 3e-3
    """Peak learning rate."""


@dataclass(frozen=True)
class TinyModel:
    """What was made."""

    parameters: int
    """Number of weights."""
    final_loss: float
    """Mean loss over the last tenth of the steps, in nats per token."""


def create_tiny_model(
    folder: Path,
    settings: TinyModelSettings,
    *,
    extra_texts: Iterable[str] = (),
    report: Report = lambda _step, _total, _loss: None,
) -> TinyModel:
    """Learn the tokenizer, pretrain on the shipped dialogues and save a Hugging Face folder.

    The texts besides the shipped ones shape the tokenizer only: the base shall not know what an adapter will teach.
    """
    pairs = corpus_dialogues()
    texts = [text for pair in pairs for text in pair]
    tokenizer = train_tokenizer([*texts, *extra_texts], settings.vocab_size)
    set_seed(settings.seed)
    model = _new_model(tokenizer)
    losses = _pretrain(model, _encode(tokenizer, pairs), settings, report)
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder)
    tail = losses[-max(1, len(losses) // 10) :]
    return TinyModel(sum(weights.numel() for weights in model.parameters()), sum(tail) / len(tail))


def _new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    own: Any = tokenizer
    config = Qwen2Config(
        # A multiple of 64 rows, as servers pad the vocabulary to.
        vocab_size=math.ceil(len(own) / 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    initialise(model)
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, do_sample=False
    )
    return model


def initialise(model: Qwen2ForCausalLM) -> None:
    """Start wider than the usual 0.02, which wastes most of a minute's pretraining.

    The embeddings above all: they are frozen when an adapter is trained, and are the output layer too. Tokens that the
    corpus lacks keep their random vectors; only long ones can be told apart, and be given a high score, by an adapter
    alone. Measured on 64 persona rows after 100 LoRA steps: loss 2.2 with 0.05, 0.01 with 0.2.
    """
    for name, weights in model.named_parameters():
        if weights.dim() != 2:
            continue
        deviation = weights.shape[1] ** -0.5
        if "embed_tokens" in name:
            deviation = _EMBEDDING_DEVIATION
        elif "o_proj" in name or "down_proj" in name:
            deviation /= (2 * model.config.num_hidden_layers) ** 0.5
        torch.nn.init.normal_(weights, std=deviation)


def _encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    rows = []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        rows.append(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    return rows


def _batches(rows: list[list[int]], tokens: int, generator: random.Random) -> Iterable[list[list[int]]]:
    """Yield batches without end: shuffled, then grouped by length so that little is padded."""
    while True:
        shuffled = generator.sample(rows, len(rows))
        shuffled.sort(key=lambda row: len(row) // 4)
        groups: list[list[list[int]]] = [[]]
        for row in shuffled:
            if groups[-1] and len(row) * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(row)
        generator.shuffle(groups)
        yield from groups


def _pretrain(
    model: Qwen2ForCausalLM, rows: list[list[int]], settings: TinyModelSettings, report: Report
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    pad = model.config.pad_token_id
    losses: list[float] = []
    generator = random.Random(settings.seed)  # noqa: S311  (a shuffle, no secret)
    model.train()
    for step, batch in enumerate(_batches(rows, settings.tokens_per_step, generator), start=1):
        width = max(map(len, batch))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        loss = model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise _diverged(step)
        report(step, settings.steps, losses[-1])
        if step == settings.steps:
            break
    model.eval()
    return losses


def _rate(step: int, steps: int) -> float:
    warm = max(1, min(20, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _diverged(step: int) -> LoralineError:
    return failed_precondition("TINY_MODEL_DIVERGED", f"The loss is not a number at step {step}. Take another seed.")
