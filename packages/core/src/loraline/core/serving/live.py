"""Series read from the job table when someone asks: how many jobs stand where, and the figures of live trainings."""

from __future__ import annotations

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
FIGURES = {
    "loss": ("loss", "Training loss of a live run in nats per token."),
    "eval_loss": ("eval_loss", "Newest evaluation loss of a live run in nats per token."),
    "token_accuracy": ("token_accuracy_ratio", "Share of response tokens that a live run predicts right, 0 to 1."),
    "learning_rate": ("learning_rate", "Learning rate of a live run."),
    "grad_norm": ("grad_norm", "Norm of a live run's gradient before clipping."),
    "tokens_per_second": ("tokens_per_second", "Tokens a second of a live run, padding not counted."),
    "samples_per_second": ("samples_per_second", "Rows, or packed sequences, a second of a live run."),
    "step_seconds": ("step_seconds", "Time of a live run's newest optimizer step."),
    "epoch": ("epochs", "Passes over the data that a live run has made."),
    "gpu_memory_bytes": ("gpu_memory_bytes", "Most GPU memory that a live run has held; absent without a GPU."),
}
"""Figure in a training's progress -> what follows `loraline_training_`, and its text. No other figure is exported."""
_FROM_PROGRESS = {
    "progress_ratio": "Part of a live run that is done, 0 to 1.",
    "steps": "Optimizer steps that a live run has made.",
    "steps_planned": "Optimizer steps that a live run will have made at its end.",
    "eta_seconds": "Time that a live run still needs; absent until it is known.",
}
_TEXTS = {**dict(FIGURES.values()), **_FROM_PROGRESS}
_RUN = ("run", "base_model")
_STATES = {value: name.removeprefix("JOB_STATE_").lower() for name, value in job_pb2.JobState.items() if value}
log = structlog.get_logger("loraline.metrics")


class JobTableMetrics(Collector):
    """Jobs by kind and state, and how long the oldest queued and the oldest paused job of each kind have stood.

    A server speaks for its own kinds only: with one database behind four services each job is then counted by one.
    """

    def __init__(self, database: Database, kinds: Sequence[str]):
        self._database = database
        self._kinds = tuple(kinds)

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the families without series: registering asks no database."""
        return [
            GaugeMetricFamily("loraline_jobs", "Jobs in the table by kind and state.", labels=("kind", "state")),
            GaugeMetricFamily(
                "loraline_job_queue_age_seconds",
                "How long the oldest queued job has waited; 0 for none.",
                labels=("kind",),
            ),
            GaugeMetricFamily(
                "loraline_job_pause_age_seconds",
                "How long the oldest paused job has stood paused; 0 for none.",
                labels=("kind",),
            ),
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield a series for every kind and state, zeros included; none while the database does not answer."""
        counts = sa.select(jobs.c.kind, jobs.c.state, sa.func.count()).group_by(jobs.c.kind, jobs.c.state)
        waiting = sa.select(jobs.c.kind, sa.func.min(jobs.c.queue_time)).where(
            jobs.c.state == job_pb2.JOB_STATE_QUEUED, jobs.c.kind.in_(self._kinds)
        )
        # A paused job does not change, so its last change was the pause.
        paused = sa.select(jobs.c.kind, sa.func.min(jobs.c.update_time)).where(
            jobs.c.state == job_pb2.JOB_STATE_PAUSED, jobs.c.kind.in_(self._kinds)
        )
        try:
            with self._database.read() as connection:
                found = {(kind, state): count for kind, state, count in connection.execute(counts)}
                queued_since = {row[0]: row[1] for row in connection.execute(waiting.group_by(jobs.c.kind))}
                paused_since = {row[0]: row[1] for row in connection.execute(paused.group_by(jobs.c.kind))}
        except Exception as error:
            log.warning("job table cannot be read for metrics", error=str(error))
            return
        gauge, queue_age, pause_age = self.describe()
        now = time.time()
        for kind in self._kinds:
            for value, name in _STATES.items():
                gauge.add_metric((kind, name), found.get((kind, value), 0))
            for age, since in ((queue_age, queued_since), (pause_age, paused_since)):
                age.add_metric((kind,), max(0.0, now - since[kind]) if since.get(kind) else 0.0)
        yield from (gauge, queue_age, pause_age)


class LiveRuns(Collector):
    """`loraline_training_<figure>{run,base_model}` for every RUNNING training; the series go when the run ends."""

    def __init__(self, database: Database):
        self._database = database

    def describe(self) -> list[Metric]:
        """Return the families without series: registering asks no database."""
        return [_run_gauge(name) for name in _TEXTS]

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
                figures[name][labels] = value
        for name, series in sorted(figures.items()):
            family = _run_gauge(name)
            for labels, value in series.items():
                family.add_metric(labels, value)
            yield family


def _run_gauge(name: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"loraline_training_{name}", _TEXTS[name], labels=_RUN)


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
    figures = {FIGURES[name][0]: value for name, value in message.metrics.items() if name in FIGURES}
    figures["progress_ratio"] = message.fraction
    figures["steps"] = float(message.step)
    figures["steps_planned"] = float(message.total_steps)
    if message.HasField("eta"):
        figures["eta_seconds"] = message.eta.ToTimedelta().total_seconds()
    return figures
