"""What callers are told when the engine fails them."""

from __future__ import annotations

from loraline.core.errors import LoralineError, unavailable


def engine_gone() -> LoralineError:
    """UNAVAILABLE for requests whose engine died under them."""
    return unavailable(
        "ENGINE_DEAD", "The engine died while it answered; it is being started again. Ask again in a moment."
    )
