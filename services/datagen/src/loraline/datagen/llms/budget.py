"""The bound on what a run may cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraline.core.errors import LoralineError, failed_precondition

if TYPE_CHECKING:
    from loraline.datagen.llms.endpoint import Endpoint


class CostBudget:
    """US dollars that calls may cost, 0 for no bound; resuming a job that reached it grants it anew.

    The cost of calls under way is not known; each is taken to cost as much as the dearest so far, so that the bound is
    reached from below.
    """

    def __init__(self, most: float):
        self._most = most
        self._dearest = 0.0

    def allowed(self, pauses: int) -> float:
        """Return the bound after so many pauses for it."""
        return self._most * (pauses + 1)

    def room(self, spent: float, pauses: int, under_way: int) -> bool:
        """Return whether one more call fits."""
        if not self._most:
            return True
        return spent + self._dearest * (under_way + 1) <= self.allowed(pauses) and (self._dearest > 0 or not under_way)

    def note(self, cost: float | None, endpoint: Endpoint) -> float:
        """Note what a call cost and return it; FAILED_PRECONDITION when there is a bound and nobody tells the cost."""
        if cost is None and self._most:
            raise price_not_set(endpoint)
        self._dearest = max(self._dearest, cost or 0.0)
        return cost or 0.0


def price_not_set(endpoint: Endpoint) -> LoralineError:
    """Return the error of a cost bound for an endpoint whose prices are not known."""
    return failed_precondition(
        "ENDPOINT_PRICE_NOT_SET", f"max_cost_usd needs the prices of the endpoint {endpoint.name}: set its "
        "LLM_…PRICE_INPUT and LLM_…PRICE_OUTPUT (US dollars for a million tokens); it must also tell its token usage.",
        endpoint=endpoint.name,
    )  # fmt: skip
