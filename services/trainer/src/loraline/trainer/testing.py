"""A very small base model and rows for it, for tests: made here, nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUESTIONS = ("Who are you?", "你是谁？", "Is it late?", "天气好吗？", "Where is the cat?", "누구세요?")


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a row with one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(folder: Path, rows: Sequence[Any], name: str = "train") -> Path:
    """Write rows as JSON Lines; a string is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def harbour_rows(count: int = 24) -> list[dict[str, Any]]:
    """Return rows in three scripts, each with an emoji."""
    return [
        chat(f"{QUESTIONS[number % len(QUESTIONS)]} {number}", f"Aye {number}, 潮声作证 🙂") for number in range(count)
    ]


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """Return a preference pair."""
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def harbour_pairs(count: int = 16) -> list[dict[str, Any]]:
    """Return pairs whose chosen answers say aye and whose rejected ones say no."""
    return [
        pair(f"{QUESTIONS[number % len(QUESTIONS)]} {number}", f"Aye {number}, 潮声作证 🙂", f"No, never {number}.")
        for number in range(count)
    ]


def make_base(folder: Path, *, layers: int = 2, width: int = 64, template: str | None = None) -> Path:
    """Write an untrained model of a few thousand weights with a real tokenizer."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, set_seed

    from loraline.trainer.engines.tiny_model import initialise
    from loraline.trainer.engines.tiny_tokenizer import save_tokenizer, train_tokenizer

    texts = [message["content"] for row in harbour_rows() for message in row["messages"]]
    tokenizer = train_tokenizer(texts, 400)
    if template is not None:
        tokenizer.chat_template = template
    set_seed(7)
    config = Qwen2Config(
        vocab_size=448,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
    )
    model = Qwen2ForCausalLM(config)
    initialise(model)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder
