"""What a stage hands to the server, and what the server hands to a stage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc.aio
from prometheus_client import CollectorRegistry

from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.queue import JobQueue

if TYPE_CHECKING:
    from loraline.core.db.database import Database
    from loraline.core.serving.metrics import JobMetrics


@dataclass
class Platform:
    """What every stage builds on: one per process, shared by the stages of an all-in-one server."""

    settings: CoreSettings
    database: Database
    library: ArtifactLibrary
    jobs: JobQueue
    registry: CollectorRegistry
    job_metrics: JobMetrics | None = None
    """Hears of jobs; shared by the queue and the runners."""


async def _nothing() -> None:
    """Do nothing."""


async def _ready() -> str:
    """Return that nothing is missing."""
    return ""


@dataclass
class Component:
    """A stage, ready to be served alone or beside others."""

    name: str
    """Name of the stage: `datagen`, `trainer`, `merger`, `inference`."""
    services: dict[str, Callable[[grpc.aio.Server], None]]
    """Full gRPC service name -> function that adds its servicer to a server."""
    job_handlers: tuple[JobHandler, ...] = ()
    """The kinds of job that this stage runs."""
    start: Callable[[], Awaitable[None]] = _nothing
    """Called once before the server accepts calls; long loading belongs into a task started here."""
    stop: Callable[[], Awaitable[None]] = _nothing
    """Called once after the server stopped accepting calls."""
    not_ready_because: Callable[[], Awaitable[str]] = _ready
    """Empty when the stage can do its work now; otherwise why not. Feeds health checks."""
    http_app: Any | None = None
    """ASGI application of the stage, with the address to serve it on in `http_listen`."""
    http_listen: str = ""
    """host:port for http_app."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Stage's own objects, for tests."""


ComponentBuilder = Callable[[Platform], Component]
