"""Counts of HTTP requests refused because of their key; gRPC's are in `grpc_server_handled_total`.

The counts are made in the server's event loop and become Prometheus series only when someone asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_REASONS = ("MISSING_KEY", "UNKNOWN_KEY", "ROLE_MISSING")
"""Shown at zero before the first, so that an alert on an increase sees it."""


class KeyRefusals(Collector):
    """The refusals of all HTTP sides of a server; register it in the platform's registry."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}

    def of(self, part: str) -> Callable[[str], None]:
        """Return what counts a refusal of a stage's HTTP side, by its reason."""
        self._counts.update({(part, reason): 0 for reason in _REASONS})

        def refused(reason: str) -> None:
            self._counts[part, reason] = self._counts.get((part, reason), 0) + 1

        return refused

    def describe(self) -> list[Metric]:
        """Return the family without series."""
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        """Yield the counts as they stand."""
        family = self._family()
        for labels, count in sorted(self._counts.copy().items()):
            family.add_metric(labels, count)
        yield family

    @staticmethod
    def _family() -> CounterMetricFamily:
        text = "HTTP requests refused for want of a key, of a known key (401), or of a role (403), by stage and reason."
        return CounterMetricFamily("loraline_http_key_refusals_total", text, labels=("part", "reason"))
