"""Rendering conversations with a folder's tokenizer, to prove that it gives the ids of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.receipt import Messages, RenderingMismatch, TokenReceipt, compare_rendering
from loraline.merger.check.findings import Finding, from_error
from loraline.merger.limits import Failed, TooSlow, contained
from loraline.merger.texts import PLAIN_TEXTS

RENDER_SECONDS = 10.0
"""A template that takes longer for one conversation is hostile or broken."""
RENDER_BYTES = 512 * 1024 * 1024
"""Memory that rendering one conversation may take."""


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer without running code of the model; FAILED_PRECONDITION TOKENIZER_NOT_LOADABLE."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, even bare Exception from the Rust side
        raise failed_precondition(
            "TOKENIZER_NOT_LOADABLE",
            f"transformers cannot load the tokenizer: {type(error).__name__}: {str(error)[:600]}. "
            "CheckModel on the base says what does not fit.",
        ) from error


def renderer(tokenizer: Any) -> Callable[[Messages], list[int]]:
    """Return a function that gives the ids of a whole conversation; the template runs in transformers' sandbox."""

    def render(messages: Messages) -> list[int]:
        return [int(number) for number in _apply(tokenizer, messages, tokenize=True, return_dict=False)]

    return render


def text_renderer(tokenizer: Any) -> Callable[[Sequence[Any], bool], str]:
    """Return a function that gives the text of a conversation, with the assistant's turn opened or not."""

    def render(messages: Sequence[Any], generation: bool) -> str:
        return str(_apply(tokenizer, list(messages), tokenize=False, add_generation_prompt=generation))

    return render


def _apply(tokenizer: Any, messages: Any, **options: Any) -> Any:
    try:
        return contained(
            lambda: tokenizer.apply_chat_template(messages, **options), seconds=RENDER_SECONDS, memory=RENDER_BYTES
        )
    except TooSlow as error:
        raise failed_precondition(
            "CHAT_TEMPLATE_TIMEOUT",
            f"The chat template ran longer than {RENDER_SECONDS:g} s on one conversation and was stopped. Use another.",
        ) from error
    except Failed as error:
        raise failed_precondition(
            "CHAT_TEMPLATE_FAILED",
            f"The chat template cannot render a conversation: {str(error)[:300]}. "
            "Use the template that the adapter was trained with.",
        ) from error


def receipt_mismatches(folder: Path, receipt: TokenReceipt) -> list[RenderingMismatch]:
    """Render the receipt's rows with the folder's tokenizer; empty means equal ids everywhere."""
    return compare_rendering(receipt, renderer(load_tokenizer(folder)))


def replaced_tokenizer(folder: Path, tokenizer: Any) -> list[Finding]:
    """Say when transformers makes another tokenizer of its file, as it does for some model types and classes."""
    path = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()), None)
    encode = None if path is None else _as_the_file_says(path, tokenizer)
    if path is None or encode is None:
        return []
    for text in PLAIN_TEXTS:
        if encode(text) != tokenizer.encode(text, add_special_tokens=False):
            message = (
                f"transformers reads {path.name} as {type(tokenizer).__name__} and splits text otherwise than the "
                "file says: libraries that read the file itself give other ids."
            )
            remedy = "Save the tokenizer anew with transformers, if other libraries shall read it."
            return [Finding("TOKENIZER_REPLACED", "info", path.name, message, remedy)]
    return []


def _as_the_file_says(path: Path, tokenizer: Any) -> Callable[[str], list[int]] | None:
    """Return how the library that made the file splits text; None where that cannot be told."""
    if path.name == "tokenizer.json":
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            return None
        plain = Tokenizer.from_file(str(path))
        return lambda text: plain.encode(text, add_special_tokens=False).ids
    try:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(path)).encode
    except (ImportError, OSError, RuntimeError):  # not installed; no SentencePiece model, such as one of tiktoken
        return None


def sample_problem(tokenizer: Any, template: str) -> list[Finding]:
    """Render a short conversation; a template that fails on it fails on every request."""
    if not template:
        return []
    try:
        renderer(tokenizer)([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}])
    except LoralineError as error:
        return [from_error(error, "chat_template.jinja")]
    return []
