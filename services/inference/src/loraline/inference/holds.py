"""Tells the artifact store what is served here, so that nobody deletes it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import structlog

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.artifacts.uses import HOLD_SECONDS, hold
from loraline.core.db.database import Database
from loraline.inference.serving import Serving

_log = structlog.get_logger(__name__)
RENEW_SECONDS = HOLD_SECONDS / 4


def served_artifacts(serving: Serving | None) -> list[ArtifactRef]:
    """Return the exact references of the base, where it is an artifact, and of its adapters."""
    if serving is None:
        return []
    base = [serving.base.artifact] if serving.base.artifact is not None else []
    return [*base, *(adapter.ref for adapter in serving.adapters.list())]


class Holds:
    """Renews the holds of one server for as long as it runs."""

    def __init__(self, database: Database, serving: Callable[[], Serving | None]):
        self._database = database
        self._serving = serving
        self._holder = f"inference on {socket.gethostname()} (process {os.getpid()})"
        self._told = False

    async def renew(self) -> None:
        """Hold what is served now; a database out of reach is logged, for answering goes on without it."""
        refs = served_artifacts(self._serving())
        if not refs and not self._told:
            return
        try:
            await asyncio.to_thread(hold, self._database, self._holder, refs)
            self._told = bool(refs)
        except Exception as error:
            _log.warning("holds_not_renewed", error=str(error))

    async def keep(self) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            await self.renew()

    async def release(self) -> None:
        """Let everything go; the server stops."""
        if self._told:
            self._serving = lambda: None
            await self.renew()
