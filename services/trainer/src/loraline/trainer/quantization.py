"""Whether bitsandbytes is here to hold a base in 4 or 8 bits. No torch: it is tried where a base is loaded."""

from __future__ import annotations

import importlib.util

from loraline.core.errors import LoralineError, failed_precondition

QUANTIZED = ("nf4", "int8")


def missing() -> str:
    """Return that bitsandbytes is not installed; empty when it is."""
    return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def check_quantization(wish: str) -> None:
    """Raise FAILED_PRECONDITION (QUANTIZATION_UNAVAILABLE) for `nf4` and `int8` without bitsandbytes."""
    problem = missing() if wish in QUANTIZED else ""
    if problem:
        raise unavailable(wish, problem)


def unavailable(wish: str, problem: str) -> LoralineError:
    """Return FAILED_PRECONDITION (QUANTIZATION_UNAVAILABLE)."""
    message = (
        f"parameters.quantization asks for {wish}, but {problem}. Install loraline-trainer[quantization], or set "
        "parameters.quantization to QUANTIZATION_NONE or QUANTIZATION_AUTO."
    )
    return failed_precondition("QUANTIZATION_UNAVAILABLE", message)
