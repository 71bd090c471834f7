"""How good a final loss or token accuracy is.

The bands are a rule of thumb for chat adapters trained on a few hundred to a few thousand rows with the loss on
responses only: below a loss of 0.3 nats per token such a model repeats what it was taught, above 0.5 it answers beside
the question. For large, varied data a higher loss is normal, so that a falling evaluation loss counts for more.
"""

from __future__ import annotations

from typing import NamedTuple


class Band(NamedTuple):
    """A range of a figure."""

    name: str
    bound: float
    """Loss: below this. Accuracy: at or above this."""


LOSS_BANDS = (Band("excellent", 0.1), Band("good", 0.3), Band("fair", 0.5), Band("insufficient", float("inf")))
ACCURACY_BANDS = (Band("excellent", 0.95), Band("good", 0.9), Band("fair", 0.8), Band("insufficient", 0.0))


def loss_band(loss: float) -> str:
    """Return the name of the band that a loss in nats per token lies in; 0.3 and 0.5 belong to the better band."""
    if loss < LOSS_BANDS[0].bound:
        return LOSS_BANDS[0].name
    return next((band.name for band in LOSS_BANDS[1:] if loss <= band.bound), LOSS_BANDS[-1].name)


def accuracy_band(accuracy: float) -> str:
    """Return the name of the band that a token accuracy (0 to 1) lies in; 0.95 itself is good, not excellent."""
    if accuracy > ACCURACY_BANDS[0].bound:
        return ACCURACY_BANDS[0].name
    return next((band.name for band in ACCURACY_BANDS[1:] if accuracy >= band.bound), ACCURACY_BANDS[-1].name)
