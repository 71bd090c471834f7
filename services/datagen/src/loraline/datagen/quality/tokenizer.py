"""The base model's tokenizer, from its tokenizer.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, failed_precondition


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a tokenizer.json; FAILED_PRECONDITION says what is wrong with it."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise broken_tokenizer(f"its tokenizer.json cannot be read: {error}") from error


def broken_tokenizer(why: str) -> LoralineError:
    """Return the error for a base model whose tokenizer cannot be used."""
    return failed_precondition(
        "TOKENIZER_UNUSABLE", f"The rows cannot be checked against gate.base_model: {why}. Name a base model with a "
        "tokenizer.json, or leave gate.base_model and gate.max_length unset.",
    )  # fmt: skip
