"""Rendering conversations with a folder's tokenizer, to prove that it gives the ids of the training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import AutoTokenizer

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.receipt import Messages, RenderingMismatch, TokenReceipt, compare_rendering

RENDER_SECONDS = 10.0
"""A template that takes longer for one conversation is hostile or broken."""


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
        with time_limit(RENDER_SECONDS):
            try:
                ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            except LoralineError:
                raise
            except Exception as error:
                raise failed_precondition(
                    "CHAT_TEMPLATE_FAILED",
                    f"The chat template cannot render a conversation of the training: {str(error)[:300]}. "
                    "Use the template that the adapter was trained with.",
                ) from error
        return [int(number) for number in ids]

    return render


def receipt_mismatches(folder: Path, receipt: TokenReceipt) -> list[RenderingMismatch]:
    """Render the receipt's rows with the folder's tokenizer; empty means equal ids everywhere."""
    return compare_rendering(receipt, renderer(load_tokenizer(folder)))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop Python code that runs too long with FAILED_PRECONDITION CHAT_TEMPLATE_TIMEOUT.

    Works by a signal, hence in the main thread only, where a job's code runs; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise failed_precondition(
            "CHAT_TEMPLATE_TIMEOUT",
            f"The chat template ran longer than {seconds:g} s on one conversation and was stopped. Use another.",
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
