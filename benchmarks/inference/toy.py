"""A small random Qwen2 with a tokenizer of its own, and LoRA adapters on it with a trainer's evidence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "services" / "inference" / "tests"))
MAX_LEN = 2048


def make_model(folder: Path) -> Any:
    """Write the model of 4 layers, hidden size 256, some 3 million weights; return its tokenizer."""
    import torch
    from conftest import _tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_LEN, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    # Sharp enough that it never ends an answer before its limit: all answers of a round are equally long.
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.lm_head.weight.data[tokenizer.eos_token_id].zero_()
    model.save_pretrained(folder)
    return tokenizer


def make_adapters(model: Path, root: Path, tokenizer: Any, count: int, rank: int = 8) -> list[Path]:
    """Write random adapters with probes and token receipts."""
    from conftest import _adapter  # pyright: ignore[reportAttributeAccessIssue]

    folders = [root / f"adapter{number}" for number in range(count)]
    for number, folder in enumerate(folders):
        _adapter(model, folder, tokenizer, number + 1, 0.05, rank)
    return folders
