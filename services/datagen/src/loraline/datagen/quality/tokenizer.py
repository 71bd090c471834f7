"""The base model's tokenizer, from its tokenizer.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.specials import SpecialTokens
from loraline.datagen.quality.rules.control import USUAL


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a tokenizer.json; FAILED_PRECONDITION says what is wrong with it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise broken_tokenizer(f"its tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()  # Some are saved with the lengths of a training.
    tokenizer.no_padding()
    return tokenizer


class _AsTransformers:
    """What SpecialTokens asks of a tokenizer of transformers, from one of a tokenizer.json.

    The usual control tokens count as special where the tokenizer has them, whatever it says of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.added_tokens_decoder = tokenizer.get_added_tokens_decoder()
        known = (tokenizer.token_to_id(token) for token in USUAL)
        self.all_special_ids = [number for number in known if number is not None]
        unknown = _unknown_token(tokenizer)
        self.unk_token_id = tokenizer.token_to_id(unknown)
        special = getattr(self.added_tokens_decoder.get(self.unk_token_id), "special", False)
        self.unk_token = unknown if special else ""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def convert_ids_to_tokens(self, number: int) -> str:
        return self._tokenizer.id_to_token(number)


def _unknown_token(tokenizer: Any) -> str:
    """Return what stands for characters that the tokenizer does not know; empty when it knows all."""
    if hasattr(tokenizer.model, "unk_token"):
        return tokenizer.model.unk_token or ""
    number = json.loads(tokenizer.to_str())["model"].get("unk_id")  # Unigram keeps it to itself.
    return "" if number is None else tokenizer.id_to_token(number)


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the control tokens of a loaded tokenizer, as the trainer sees them."""
    return SpecialTokens(_AsTransformers(tokenizer))


def broken_tokenizer(why: str) -> LoralineError:
    """Return the error for a base model whose tokenizer cannot be used."""
    return failed_precondition(
        "TOKENIZER_UNUSABLE", f"The rows cannot be checked against gate.base_model: {why}. Name a base model with a "
        "tokenizer.json, or leave gate.base_model and gate.max_length unset.",
    )  # fmt: skip
