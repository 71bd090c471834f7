"""Puts the platform together: database, store, job queue, metrics; and the services that every server has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc.aio
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from loraline.api.artifact.v1 import artifact_pb2_grpc
from loraline.api.job.v1 import job_pb2_grpc
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.service import ArtifactService
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.jobs.queue import JobQueue
from loraline.core.jobs.runner import JobRunner
from loraline.core.jobs.service import JobService
from loraline.core.jobs.sql_table import open_table
from loraline.core.private_paths import hide_folder
from loraline.core.serving.component import Component, Platform
from loraline.core.serving.live import TRAINING_KIND, JobTableMetrics, LiveRuns
from loraline.core.serving.metrics import ArtifactMetrics, JobMetrics
from loraline.core.serving.startup import make_data_dir, refuse_private_state

ARTIFACT_SERVICE = "loraline.api.artifact.v1.ArtifactService"
JOB_SERVICE = "loraline.api.job.v1.JobService"


def open_platform(settings: CoreSettings) -> Platform:
    """Create the data folder, bring the database up to date, and open store and queue.

    Raises LoralineError (REPLICAS_NEED_SHARED_STATE, DATA_DIR_UNUSABLE, DATABASE_…, STORE_…) naming the setting to
    change.
    """
    refuse_private_state(settings)
    make_data_dir(settings.data_dir)
    hide_folder(settings.data_dir, "$LORALINE_DATA_DIR")
    database = Database(settings.database_url)
    try:
        database.migrate()
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        library = ArtifactLibrary.open(settings, database)
        library.store.probe()
        library.observer = ArtifactMetrics(registry)
    except BaseException:
        database.close()
        raise
    job_metrics = JobMetrics(registry)
    queue = JobQueue(open_table(database), data_dir=settings.data_dir, observer=job_metrics)
    return Platform(settings, database, library, queue, registry, job_metrics)


def platform_services(platform: Platform) -> dict[str, Callable[[grpc.aio.Server], None]]:
    """Return the services that every server of the platform has, by full name."""
    return {
        ARTIFACT_SERVICE: lambda server: artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
            ArtifactService(platform.library), server
        ),
        JOB_SERVICE: lambda server: job_pb2_grpc.add_JobServiceServicer_to_server(JobService(platform.jobs), server),
    }


def make_runners(platform: Platform, components: Sequence[Component]) -> list[JobRunner]:
    """Return one runner for each stage that has jobs: `max_concurrent_jobs` counts for a stage.

    Registers the series of these stages' jobs; a server speaks for the kinds that it runs and for no others.
    """
    kinds = [handler.kind for component in components for handler in component.job_handlers]
    if platform.job_metrics is not None:
        platform.job_metrics.announce(kinds)
    if kinds:
        platform.registry.register(JobTableMetrics(platform.database, kinds))
    if TRAINING_KIND in kinds:
        platform.registry.register(LiveRuns(platform.database))
    return [
        JobRunner(platform.settings, platform.jobs.table, component.job_handlers, observer=platform.job_metrics)
        for component in components
        if component.job_handlers
    ]
