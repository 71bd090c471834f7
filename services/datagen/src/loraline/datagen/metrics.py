"""Datagen's own metrics: what the servicer does, and what the jobs' processes tell of language models."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

ROUTE = ("endpoint", "model")


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


def job_metrics(registry: CollectorRegistry) -> dict[str, Counter | Gauge]:
    """Return the metrics that jobs feed, by the names that they feed them under (see llms/).

    Rows a second is the rate of `loraline_datagen_rows_total`. Gauges are there while a job asks.
    """
    counters = {
        "requests": ("Requests to language models by result.", ("result", *ROUTE)),
        "request_seconds": ("Time that answered requests took.", ROUTE),
        "rows": ("Rows of all sources by outcome; which there are is told at the label.", ("outcome",)),
        "answers_reused": ("Answers taken over from earlier jobs, which had paid for them.", ()),
        "quota_errors": ("Refusals because of a limit, by its kind.", ("reason", *ROUTE)),
        "pauses": ("Jobs paused because of a limit, a cost bound or an endpoint, by reason.", ("reason", *ROUTE)),
        "waiting_seconds": ("Time that jobs waited for limits.", ()),
        "tokens": ("Tokens of language models by direction: in or out.", ("direction", *ROUTE)),
        "cost_usd": ("What answers cost, in US dollars.", ROUTE),
    }
    gauges = {
        "batch_size": ("Items asked for in one request now.", ROUTE),
        "concurrency": ("Calls at a time that an endpoint's limit allows now, of all jobs together.", ROUTE),
    }
    metrics: dict[str, Counter | Gauge] = {
        f"datagen_{name}": Counter(f"loraline_datagen_{name}", text, labels, registry=registry)
        for name, (text, labels) in counters.items()
    }
    for name, (text, labels) in gauges.items():
        metrics[f"datagen_{name}"] = Gauge(f"loraline_datagen_{name}", text, labels, registry=registry)
    return metrics
