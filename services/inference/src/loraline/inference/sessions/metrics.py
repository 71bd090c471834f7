"""Metrics of sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_log = structlog.get_logger(__name__)


class SessionMetrics:
    """Counts what happens to sessions here, and how many the database has when someone asks."""

    def __init__(self, registry: CollectorRegistry, count_open: Callable[[], int]):
        self.events = Counter(
            "loraline_inference_session_events_total",
            "What happened to sessions: created, reset, deleted, expired; turns kept, dropped, refused.",
            ["event"],
            registry=registry,
        )
        for event in ("created", "reset", "deleted", "expired", "turn_kept", "turn_dropped", "turn_refused"):
            self.events.labels(event=event)
        registry.register(_OpenSessions(count_open))

    def count(self, event: str, times: int = 1) -> None:
        """Count an event."""
        self.events.labels(event=event).inc(times)


class _OpenSessions(Collector):
    def __init__(self, count_open: Callable[[], int]):
        self._count_open = count_open

    def describe(self) -> list[Metric]:
        text = "Sessions in the database that have not expired."
        return [GaugeMetricFamily("loraline_inference_sessions", text)]

    def collect(self) -> Iterator[Metric]:
        try:
            count = self._count_open()
        except Exception as error:
            _log.warning("sessions_uncounted", error=str(error))
            return
        (gauge,) = self.describe()
        gauge.add_sample(gauge.name, {}, count)
        yield gauge
