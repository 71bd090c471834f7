"""Figures of the newest merge and check from the job table, and counters that the jobs' processes feed."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraline.api.job.v1 import job_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.core.db.database import Database
from loraline.core.db.schema import jobs
from loraline.core.serving.metrics import JobMetrics

_SEVERITIES = {
    merger_pb2.MODEL_FINDING_SEVERITY_INFO: "info",
    merger_pb2.MODEL_FINDING_SEVERITY_WARNING: "warning",
    merger_pb2.MODEL_FINDING_SEVERITY_ERROR: "error",
}
log = structlog.get_logger("loraline.metrics")


_COUNTERS = {
    "merge_seconds": ("loraline_merge_seconds", "Time of merges by part: write or measure.", ["part"]),
    "merge_written": ("loraline_merge_written_bytes", "Bytes of weights that merges and exports wrote.", ["kind"]),
    "findings": ("loraline_model_findings", "Findings of checks by code and severity.", ["code", "severity"]),
    "repairs": ("loraline_model_repairs", "Repairs in merged and repaired models by code.", ["code"]),
    "refused": ("loraline_merge_refused", "Merges and exports that failed with a typed error, by reason.", ["reason"]),
}
"""What a job counts by -> name, text and labels of the counter."""


def declare_counters(told: JobMetrics | None, registry: CollectorRegistry) -> None:
    """Register what jobs count as they go; `told` passes on what their processes tell, None where nothing does."""
    counters = {
        name: Counter(metric, text, labels, registry=registry) for name, (metric, text, labels) in _COUNTERS.items()
    }
    speed = Gauge("loraline_merge_bytes_per_second", "Speed of the merge that is being written.", registry=registry)
    if told is not None:
        told.accept(**counters, merge_speed=speed)


class MergerMetrics(Collector):
    """`loraline_merge_last_*` of the newest succeeded merge, `loraline_model_check_last_findings` of the newest check.

    Merges run in processes of their own, on any replica; their results in the table are what all replicas agree on.
    """

    def __init__(self, database: Database):
        self._database = database

    def describe(self) -> list[Metric]:
        """Return the families without series: registering asks no database."""
        return [*(_gauge(name) for name in _MERGE_TEXTS), _repairs(), _check_findings()]

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; none before the first result, or while the database does not answer."""
        try:
            merge = self._newest("merger.merge")
            check = self._newest("merger.check_model")
        except Exception as error:  # /metrics must answer when the database does not
            log.warning("merge results cannot be read for metrics", error=str(error))
            return
        if merge is not None:
            yield from _merge_figures(merge)
        if check is not None:
            yield _findings(check)

    def _newest(self, kind: str) -> Any | None:
        query = sa.select(jobs.c.result, jobs.c.start_time, jobs.c.end_time)
        query = query.where(jobs.c.kind == kind, jobs.c.state == job_pb2.JOB_STATE_SUCCEEDED)
        with self._database.read() as connection:
            return connection.execute(query.order_by(jobs.c.end_time.desc()).limit(1)).first()


def _unpack(content: bytes, message: Any) -> Any:
    AnyMessage.FromString(content).Unpack(message)
    return message


_MERGE_TEXTS = {
    "seconds": "Duration of the newest merge with its measurements.",
    "write_seconds": "Time that writing the weights took in the newest merge.",
    "measure_seconds": "Time that the newest merge's measurements took.",
    "peak_memory_bytes": "Greatest anonymous memory of the newest merge's process while it wrote.",
    "bytes_per_second": "Bytes of weights a second that the newest merge wrote.",
    "written_bytes": "Bytes of weights that the newest merge wrote.",
    "merged_tensors": "Tensors that the newest merge changed.",
    "mean_kl_nats": "Mean KL divergence of the newest merged model from base+adapter.",
    "max_abs_logprob_diff_nats": "Greatest difference of a log-probability in the newest merge.",
}
"""What follows `loraline_merge_last_` -> its text."""


def _merge_figures(row: Any) -> Iterator[Metric]:
    result = _unpack(row.result, merger_pb2.MergeResult())
    figures = {
        "seconds": max(0.0, (row.end_time or 0.0) - (row.start_time or 0.0)),
        "write_seconds": result.merge_seconds,
        "measure_seconds": result.measure_seconds,
        "peak_memory_bytes": result.merge_peak_bytes,
        "written_bytes": result.bytes_written,
        "merged_tensors": result.merged_tensors,
    }
    if result.merge_seconds > 0:
        figures["bytes_per_second"] = result.bytes_written / result.merge_seconds
    if result.measurements:
        last = result.measurements[-1]
        figures |= {"mean_kl_nats": last.mean_kl, "max_abs_logprob_diff_nats": last.max_abs_logprob_diff}
    for name, value in figures.items():
        yield _gauge(name, value)
    repairs = _repairs()
    for code, count in sorted(collections.Counter(repair.code for repair in result.repairs).items()):
        repairs.add_metric([code], count)
    yield repairs


def _gauge(name: str, value: float | None = None) -> Metric:
    return GaugeMetricFamily(f"loraline_merge_last_{name}", _MERGE_TEXTS[name], value=value)


def _repairs() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "loraline_merge_last_repairs", "Repairs in the newest merged model by code.", labels=["code"]
    )


def _check_findings() -> GaugeMetricFamily:
    text = "Findings of the newest check."
    return GaugeMetricFamily("loraline_model_check_last_findings", text, labels=["code", "severity"])


def _findings(row: Any) -> Metric:
    result = _unpack(row.result, merger_pb2.CheckModelResult())
    family = _check_findings()
    counts = collections.Counter(
        (finding.code, _SEVERITIES.get(finding.severity, "info")) for finding in result.findings
    )
    for labels, count in sorted(counts.items()):
        family.add_metric(list(labels), count)
    return family
