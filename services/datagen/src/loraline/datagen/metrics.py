"""Datagen's own metrics in the service's process.

Rows, quota refusals and waits happen in the jobs' processes; they are told in each job's progress and result.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class DatagenMetrics:
    """Counts what the servicer does besides queueing jobs."""

    def __init__(self, registry: CollectorRegistry):
        self.probes = Counter(
            "loraline_datagen_endpoint_probes",
            "Probes of language model endpoints by result: ok, or the error's reason.",
            ["result"],
            registry=registry,
        )
        self.preview_rows = Counter(
            "loraline_datagen_preview_rows", "Rows made for previews by kind of source.", ["source"], registry=registry
        )
