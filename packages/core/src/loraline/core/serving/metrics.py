"""Counters that the job engine and the artifact library feed. Labels are kinds and states, never names of jobs."""

from __future__ import annotations

import threading

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from loraline.core.jobs.model import QueueState
from loraline.core.jobs.telemetry import Series, Telemetry

log = structlog.get_logger("loraline.metrics")
_JOB_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)
MOST_SERIES = 200
"""Series of one metric that jobs may make; what comes on top is counted under the labels `other`."""
_OTHER = "other"
_ARTIFACT_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600)


class JobMetrics:
    """The job engine's observer: durations, waits, take-overs."""

    def __init__(self, registry: CollectorRegistry):
        self._submitted = Counter(
            "loraline_jobs_submitted", "Jobs queued by calls to this server.", ["kind"], registry=registry
        )
        self._waits = Histogram(
            "loraline_job_queue_seconds",
            "How long jobs waited before this server started them.",
            ["kind"],
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        self._durations = Histogram(
            "loraline_job_duration_seconds",
            "How long an attempt ran, by the state that it led to.",
            ["kind", "state"],
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        self._takeovers = Counter(
            "loraline_job_lease_takeovers", "Jobs taken over from runners gone silent.", ["kind"], registry=registry
        )

        self._told: dict[str, Counter | Gauge] = {}
        self._standing: dict[str, dict[Series, float]] = {}
        self._unknown: set[str] = set()
        self._made: dict[str, set[Series]] = {}
        self._lock = threading.Lock()

    def accept(self, **metrics: Counter | Gauge) -> None:
        """Let jobs feed these metrics by these names (JobContext.count and JobContext.gauge)."""
        self._told.update(metrics)

    def job_told(self, kind: str, job: str, figures: Telemetry) -> None:
        """Add a job's counts and set its gauges; where two live jobs set one gauge, the newest value shows."""
        with self._lock:
            for key, amount in figures.counts.items():
                if isinstance(metric := self._metric(kind, key), Counter) and amount >= 0:
                    metric.inc(amount)
            for key, value in figures.gauges.items():
                if isinstance(metric := self._metric(kind, key), Gauge):
                    metric.set(value)
                    self._standing.setdefault(job, {})[key] = value

    def job_gone(self, kind: str, job: str) -> None:
        """Remove the gauges of a job that no other live job sets."""
        with self._lock:
            gone = self._standing.pop(job, {})
            left = {key: value for other in self._standing.values() for key, value in other.items()}
            for key in gone:
                metric = self._metric(kind, key)
                if key in left and isinstance(metric, Gauge):
                    metric.set(left[key])
                elif metric is not None:
                    _remove(self._told[key[0]], key)
                    self._made.get(key[0], set()).discard(key)

    def _metric(self, kind: str, key: Series) -> Counter | Gauge | None:
        """Return the metric with the labels of a series; None, and one line in the log, for what nobody declared."""
        name, labels = key
        try:
            metric = self._told[name]
            if not labels:
                return metric
            made = self._made.setdefault(name, set())
            if key not in made and len(made) >= MOST_SERIES:
                # A total stays right without its labels, a gauge does not.
                return metric.labels(**dict.fromkeys(dict(labels), _OTHER)) if isinstance(metric, Counter) else None
            child = metric.labels(**dict(labels))
            made.add(key)
            return child
        except (KeyError, ValueError) as error:
            if name not in self._unknown:
                self._unknown.add(name)
                log.warning("a job told a figure that no metric takes", kind=kind, metric=name, error=str(error))
            return None

    def announce(self, kinds: list[str]) -> None:
        """Show the series of these kinds at zero, so that an alert on an increase sees the first one."""
        for kind in kinds:
            self._submitted.labels(kind)
            self._takeovers.labels(kind)
            for state in ("succeeded", "failed"):
                self._durations.labels(kind, state)

    def job_submitted(self, kind: str) -> None:
        """Count a new job."""
        self._submitted.labels(kind).inc()

    def job_started(self, kind: str, queue_seconds: float) -> None:
        """Record how long the job had waited."""
        self._waits.labels(kind).observe(queue_seconds)

    def job_finished(self, kind: str, state: str, seconds: float) -> None:
        """Record how long the attempt took."""
        self._durations.labels(kind, state.lower()).observe(seconds)

    def lease_takeover(self, kind: str) -> None:
        """Count a take-over."""
        self._takeovers.labels(kind).inc()

    def queue_state(self, state: QueueState) -> None:
        """Do nothing: queue lengths are read from the table when someone asks."""


class ArtifactMetrics:
    """The artifact library's observer: bytes, durations, and files that did not match their digests."""

    def __init__(self, registry: CollectorRegistry):
        self._bytes = Counter(
            "loraline_artifact_bytes", "Bytes of artifacts written or read.", ["operation"], registry=registry
        )
        self._seconds = Histogram(
            "loraline_artifact_operation_seconds",
            "How long an operation on an artifact took.",
            ["operation"],
            buckets=_ARTIFACT_SECONDS,
            registry=registry,
        )
        self._failures = Counter(
            "loraline_artifact_verification_failures", "Artifacts whose content did not match.", registry=registry
        )
        for operation in ("publish", "publish_unchanged", "fetch", "verify"):
            self._bytes.labels(operation)

    def __call__(self, event: str, seconds: float, size_bytes: int) -> None:
        """Record one finished operation of the library."""
        if event == "verify_failure":
            self._failures.inc()
            return
        self._bytes.labels(event).inc(size_bytes)
        self._seconds.labels(event).observe(seconds)


def _remove(metric: Counter | Gauge, key: Series) -> None:
    name_of = dict(key[1])
    if name_of:
        metric.remove(*(name_of[label] for label in metric._labelnames))
    elif isinstance(metric, Gauge):
        metric.set(0)
