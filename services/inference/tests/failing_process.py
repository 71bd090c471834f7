"""What engine processes do that fail; a module of its own, so that a spawned process finds it."""

from __future__ import annotations

import logging
import time

from loraline.inference.engines import last_words


def fail() -> None:
    """Log a failure as vLLM's engine core does."""
    last_words.enable()
    try:
        raise ValueError("Free memory is less")
    except ValueError:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")


def fail_in_mid_run() -> None:
    """Log as vLLM's engine core does whose step fails: its settings and batch, at length, then the cause."""
    last_words.enable()
    logger = logging.getLogger("vllm.v1.engine.core")
    logger.error("Dumping input data for V1 LLM engine (v1) with config: %s, ", "model=" + "x" * 9000)
    try:
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later.")
    except RuntimeError:
        logger.exception("EngineCore encountered a fatal error.")


def wait_for_ever() -> None:
    """Stand for an engine core until it is killed."""
    time.sleep(600)
