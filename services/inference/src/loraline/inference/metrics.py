"""Metrics of the inference stage."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_ANSWER_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class InferenceMetrics:
    """Counters of requests, tokens and adapter loads, on the platform's registry."""

    def __init__(self, registry: CollectorRegistry):
        self.requests = Counter(
            "loraline_inference_requests_total",
            "Requests by kind of model (base, adapter, none) and outcome (ok, cancelled or the error's reason).",
            ["model_kind", "outcome"],
            registry=registry,
        )
        self.first_token = Histogram(
            "loraline_inference_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.tokens = Counter(
            "loraline_inference_tokens_total",
            "Tokens of prompts and of answers.",
            ["direction"],
            registry=registry,
        )
        self.adapter_loads = Counter(
            "loraline_inference_adapter_loads_total",
            "Loads of adapters: loaded, or the reason of the refusal.",
            ["result"],
            registry=registry,
        )
        for result in ("loaded", "PROOF_FAILED", "RECEIPT_MISMATCH"):
            # At zero before the first, so that an alert on an increase sees it.
            self.adapter_loads.labels(result=result)
        self.adapter_swaps = Counter(
            "loraline_inference_adapter_swaps_total",
            "Adapters taken out of the engine to make room for another; they are loaded again at their next use.",
            registry=registry,
        )
        self.adapter_requests = Counter(
            "loraline_inference_adapter_requests_total",
            "Requests that an adapter took, by adapter and outcome (ok, cancelled or the error's reason).",
            ["adapter", "outcome"],
            registry=registry,
        )
        self.adapter_seconds = Histogram(
            "loraline_inference_adapter_request_seconds",
            "Seconds that an adapter worked on a request, by adapter.",
            ["adapter"],
            buckets=_ANSWER_BUCKETS,
            registry=registry,
        )
        self.adapters = Gauge("loraline_inference_adapters", "Adapters in the engine now.", registry=registry)
        self.model_wanted = Gauge(
            "loraline_inference_model_wanted",
            "Whether a model is served, loading or failed to load: 1; 0 where none was ever asked for.",
            registry=registry,
        )
        self.in_flight = Gauge("loraline_inference_in_flight_requests", "Requests being answered.", registry=registry)
        self.waiting = Gauge(
            "loraline_inference_queued_requests",
            "Answers that wait until the engine has a place for them.",
            registry=registry,
        )
        self.refused = Counter(
            "loraline_inference_refused_total",
            "Requests refused because the queue was full (QUEUE_FULL) or the key at its limit (KEY_RATE_LIMITED).",
            ["reason"],
            registry=registry,
        )
        for reason in ("QUEUE_FULL", "KEY_RATE_LIMITED"):
            self.refused.labels(reason=reason)
        self.engine_restarts = Counter(
            "loraline_inference_engine_restarts_total",
            "Engines started again, by cause: died or hung.",
            ["cause"],
            registry=registry,
        )
        for cause in ("died", "hung"):
            self.engine_restarts.labels(cause=cause)
        self.load_seconds = Histogram(
            "loraline_inference_model_load_seconds",
            "Seconds to load a base model until it generated a token.",
            buckets=(1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
            registry=registry,
        )
        self.structured_failures = Counter(
            "loraline_inference_structured_failures_total",
            "Answers that were not of the shape or language asked, by shape and reason.",
            ["shape", "reason"],
            registry=registry,
        )
        self.structured_retries = Counter(
            "loraline_inference_structured_retries_total",
            "Answers asked for again because of their shape or language, by reason.",
            ["reason"],
            registry=registry,
        )
        self.profile_answers = Counter(
            "loraline_inference_profile_answers_total",
            "Answers of response profiles by profile and outcome (ok, cancelled or the error's reason).",
            ["profile", "outcome"],
            registry=registry,
        )
        registry.register(_VllmMetrics())

    def adapter_answered(self, adapter: str, outcome: str, seconds: float) -> None:
        """Count a request of an adapter. Its series stay until forget_adapter: no more adapters than are registered."""
        self.adapter_requests.labels(adapter=adapter, outcome=outcome).inc()
        self.adapter_seconds.labels(adapter=adapter).observe(seconds)

    def forget_adapter(self, adapter: str) -> None:
        """Remove the series of an adapter that can no longer be asked."""
        self.adapter_requests.remove_by_labels({"adapter": adapter})
        self.adapter_seconds.remove_by_labels({"adapter": adapter})

    def forget_adapters(self) -> None:
        """Remove the series of all adapters: another base model is served."""
        self.adapter_requests.clear()
        self.adapter_seconds.clear()


class _VllmMetrics(Collector):
    """Passes vLLM's own metrics through: it puts them on the process-wide registry."""

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:"))
