"""Health as it is: asks the stages and the database every second and tells gRPC's health service and /healthz."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import sqlalchemy as sa
import structlog
from grpc_health.v1 import health, health_pb2

from loraline.core.db.database import Database
from loraline.core.serving.component import Component

SERVING = health_pb2.HealthCheckResponse.SERVING
HealthServicer: Any = health.aio.HealthServicer  # pyright: ignore[reportAttributeAccessIssue] - the stubs lack it
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIVENESS = "liveness"
"""Name that is SERVING while the process answers at all: for whoever restarts it. A model that loads or a database that
is away makes a server unready, and restarting it would only end its jobs."""
_ANSWER_SECONDS = 5.0
log = structlog.get_logger("loraline.health")


def _asks_database(database: Database) -> str:
    try:
        with database.engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    except Exception as error:
        return f"The database does not answer: {type(error).__name__}."
    return ""


class HealthMonitor:
    """Keeps the health service true for a server's stages and for the services of the platform itself."""

    def __init__(
        self,
        servicer: Any,
        components: Sequence[Component],
        platform_services: Sequence[str],
        database: Database,
        period_seconds: float = 1.0,
    ):
        self._servicer = servicer
        self._components = components
        self._platform_services = platform_services
        self._database = database
        self._period = period_seconds
        self._task: asyncio.Task[None] | None = None
        self.draining = False
        self.reasons: dict[str, str] = {"server": "The server is starting."}
        """Stage name, or `database` or `server` -> why it is not ready; empty string when it is."""

    async def start(self) -> None:
        """Look once, then keep looking in a task."""
        await self._servicer.set(LIVENESS, SERVING)
        await self.refresh()
        self._task = asyncio.create_task(self._keep_looking(), name="health")

    async def drain(self) -> None:
        """Say NOT_SERVING for good: balancers stop sending calls here."""
        self.draining = True
        self.reasons = {"server": "The server is stopping."}
        await self._servicer.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Ask everyone once and set all statuses."""
        database, *stages = await asyncio.gather(
            self._ask(asyncio.to_thread(_asks_database, self._database), "The database"),
            *(self._ask(component.not_ready_because(), f"The {component.name}") for component in self._components),
        )
        if self.draining:
            return
        reasons = {"database": database}
        reasons.update({component.name: reason for component, reason in zip(self._components, stages, strict=True)})
        self._log_changes(reasons)
        self.reasons = reasons
        for service in self._platform_services:
            await self._servicer.set(service, NOT_SERVING if database else SERVING)
        for component in self._components:
            ready = not (database or reasons[component.name])
            for service in component.services:
                await self._servicer.set(service, SERVING if ready else NOT_SERVING)
        await self._servicer.set("", NOT_SERVING if any(reasons.values()) else SERVING)

    async def _ask(self, answer: Awaitable[str], who: str) -> str:
        try:
            return await asyncio.wait_for(answer, _ANSWER_SECONDS)
        except TimeoutError:
            return f"{who} did not answer its health check within {_ANSWER_SECONDS:g} s."
        except Exception as error:
            log.error("health check failed", who=who, exc_info=error)
            return f"{who}'s health check failed: {type(error).__name__}."

    def _log_changes(self, reasons: dict[str, str]) -> None:
        for name, reason in reasons.items():
            if reason != self.reasons.get(name, ""):
                log.info("readiness changed", part=name, ready=not reason, because=reason)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._period)
            try:
                await self.refresh()
            except Exception as error:
                log.error("health refresh failed", exc_info=error)
