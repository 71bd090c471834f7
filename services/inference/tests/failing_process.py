"""What an engine process does that cannot start; a module of its own, so that a spawned process finds it."""

from __future__ import annotations

import logging

from loraline.inference.engines import last_words


def fail() -> None:
    """Log a failure as vLLM's engine core does."""
    last_words.enable()
    try:
        raise ValueError("Free memory is less")
    except ValueError:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
