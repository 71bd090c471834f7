"""Counts of gRPC calls under the names that dashboards of go-grpc-prometheus read.

All calls of a server run in one event loop, so the counts are plain integers without locks; they become Prometheus
series only when someone asks. That costs a fraction of a microsecond a call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import grpc
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histogram in seconds: generation takes longer than go-grpc-prometheus' ten seconds."""
_CODES = {code.value[0]: "".join(part.capitalize() for part in code.name.split("_")) for code in grpc.StatusCode}
_CODES.update({0: "OK", 1: "Canceled"})  # as Go spells them
_LABELS = ("grpc_type", "grpc_service", "grpc_method")


class MethodStats:
    """What happened on one method since the server started."""

    __slots__ = ("buckets", "handled", "in_flight", "labels", "received", "seconds", "sent", "started")

    def __init__(self, grpc_type: str, service: str, method: str):
        self.labels = (grpc_type, service, method)
        self.started = 0
        self.received = 0
        self.sent = 0
        self.handled: dict[int, int] = {}
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.in_flight = 0

    def begin(self) -> None:
        """Count a call that arrived."""
        self.started += 1
        self.in_flight += 1

    def end(self, code: int, seconds: float) -> None:
        """Count a call that ended with the numeric status code after so many seconds."""
        self.in_flight -= 1
        self.handled[code] = self.handled.get(code, 0) + 1
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class GrpcMetrics(Collector):
    """The stats of all methods of a server; register it in the platform's registry."""

    def __init__(self) -> None:
        self.methods: dict[str, MethodStats] = {}

    def of(self, grpc_type: str, path: str) -> MethodStats:
        """Return the stats of `/package.Service/Method`, made when asked for the first time."""
        stats = self.methods.get(path)
        if stats is None:
            _, service, method = path.split("/")
            stats = self.methods[path] = MethodStats(grpc_type, service, method)
        return stats

    def describe(self) -> list[Metric]:
        """Return the families without series."""
        return [*self._counters(), self._seconds()]

    def _counters(self) -> list[CounterMetricFamily]:
        return [
            CounterMetricFamily("grpc_server_started_total", "RPCs started on the server.", labels=_LABELS),
            CounterMetricFamily("grpc_server_msg_received_total", "Messages received.", labels=_LABELS),
            CounterMetricFamily("grpc_server_msg_sent_total", "Messages sent.", labels=_LABELS),
            CounterMetricFamily(
                "grpc_server_handled_total", "RPCs completed, by status code.", labels=(*_LABELS, "grpc_code")
            ),
        ]

    def _seconds(self) -> HistogramMetricFamily:
        text = "Time from a call's arrival to its end."
        return HistogramMetricFamily("grpc_server_handling_seconds", text, labels=_LABELS)

    def collect(self) -> Iterator[Metric]:
        """Yield all series as they stand."""
        started, received, sent, handled = self._counters()
        seconds = self._seconds()
        for stats in list(self.methods.values()):
            started.add_metric(stats.labels, stats.started)
            received.add_metric(stats.labels, stats.received)
            sent.add_metric(stats.labels, stats.sent)
            for code, count in sorted(stats.handled.copy().items()):
                handled.add_metric((*stats.labels, _CODES.get(code, "Unknown")), count)
            total, buckets = 0, []
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), list(stats.buckets), strict=True):
                total += count
                buckets.append((bound, total))
            seconds.add_metric(stats.labels, buckets, sum_value=stats.seconds)
        yield from (started, received, sent, handled, seconds)
