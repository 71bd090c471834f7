"""Series read from the job table when someone asks: how many jobs stand where, and the figures of live trainings."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import sqlalchemy as sa
import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.core.db.database import Database
from loraline.core.db.schema import jobs

TRAINING_KIND = "trainer.train"
_MOST_FIGURES = 40
_STATES = {value: name.removeprefix("JOB_STATE_").lower() for name, value in job_pb2.JobState.items() if value}
log = structlog.get_logger("loraline.metrics")


class JobTableMetrics(Collector):
    """`loraline_jobs{kind,state}` and `loraline_job_queue_age_seconds{kind}` for the kinds that this server runs.

    A server speaks for its own kinds only: with one database behind four services each job is then counted by one.
    """

    def __init__(self, database: Database, kinds: Sequence[str]):
        self._database = database
        self._kinds = tuple(kinds)

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering asks no database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield a series for every kind and state, zeros included; none while the database does not answer."""
        counts = sa.select(jobs.c.kind, jobs.c.state, sa.func.count()).group_by(jobs.c.kind, jobs.c.state)
        waiting = sa.select(jobs.c.kind, sa.func.min(jobs.c.queue_time)).where(
            jobs.c.state == job_pb2.JOB_STATE_QUEUED, jobs.c.kind.in_(self._kinds)
        )
        try:
            with self._database.read() as connection:
                found = {(kind, state): count for kind, state, count in connection.execute(counts)}
                oldest = {row[0]: row[1] for row in connection.execute(waiting.group_by(jobs.c.kind))}
        except Exception as error:
            log.warning("job table cannot be read for metrics", error=str(error))
            return
        gauge = GaugeMetricFamily("loraline_jobs", "Jobs in the table by kind and state.", labels=("kind", "state"))
        age = GaugeMetricFamily(
            "loraline_job_queue_age_seconds", "How long the oldest queued job has waited; 0 for none.", labels=("kind",)
        )
        now = time.time()
        for kind in self._kinds:
            for value, name in _STATES.items():
                gauge.add_metric((kind, name), found.get((kind, value), 0))
            age.add_metric((kind,), max(0.0, now - oldest[kind]) if oldest.get(kind) else 0.0)
        yield gauge
        yield age


class LiveRuns(Collector):
    """`loraline_training_<figure>{run,base_model}` for every RUNNING training; the series go when the run ends."""

    def __init__(self, database: Database):
        self._database = database

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering asks no database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one gauge family for each figure that any live run reports."""
        query = sa.select(jobs.c.spec, jobs.c.progress).where(
            jobs.c.kind == TRAINING_KIND, jobs.c.state == job_pb2.JOB_STATE_RUNNING
        )
        try:
            with self._database.read() as connection:
                rows = list(connection.execute(query.order_by(jobs.c.seq)))
        except Exception as error:
            log.warning("live runs cannot be read for metrics", error=str(error))
            return
        figures: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
        for spec, progress in rows:
            labels = _labels(spec)
            for name, value in _figures(progress or b"").items():
                if name in figures or len(figures) < _MOST_FIGURES:
                    figures[name][labels] = value
        for name, series in sorted(figures.items()):
            family = GaugeMetricFamily(
                f"loraline_training_{name}", f"{name} of trainings that run now.", labels=("run", "base_model")
            )
            for labels, value in series.items():
                family.add_metric(labels, value)
            yield family


def _labels(spec: bytes) -> tuple[str, str]:
    request = trainer_pb2.TrainRequest()
    packed = job_pb2.Job().spec
    packed.ParseFromString(spec)
    packed.Unpack(request)
    base = request.base_model
    source = base.WhichOneof("source")
    if source == "artifact":
        model = base.artifact.name
    elif source == "hub_id":
        model = base.hub_id
    else:
        model = base.path.rstrip("/").rpartition("/")[2]
    return request.name, model


def _figures(progress: bytes) -> dict[str, float]:
    message = job_pb2.Progress.FromString(progress)
    figures = {
        re.sub(r"[^a-z0-9_]", "_", name.lower().removeprefix("train_")): value
        for name, value in message.metrics.items()
    }
    figures["progress_ratio"] = message.fraction
    figures["steps"] = float(message.step)
    if message.HasField("eta"):
        figures["eta_seconds"] = message.eta.ToTimedelta().total_seconds()
    return figures
