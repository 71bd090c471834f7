"""Work that a server does now and then: it removes what writers that died left in the artifact store."""

from __future__ import annotations

import asyncio

import structlog

from loraline.core.artifacts.library import ArtifactLibrary

INTERVAL_SECONDS = 3600.0
# Longer than any publish is silent: a row counts as left behind only when nothing was written for so long.
SILENT_SECONDS = 6 * 3600.0
log = structlog.get_logger("loraline.housekeeping")


async def keep_house(library: ArtifactLibrary, interval_seconds: float = INTERVAL_SECONDS) -> None:
    """Collect the store's garbage at once and then at every interval, until cancelled. Failures are logged."""
    while True:
        try:
            removed = await asyncio.to_thread(library.collect_garbage, SILENT_SECONDS)
            if removed:
                log.info("unfinished artifacts removed", versions=removed)
        except Exception as error:
            log.warning("garbage of the store could not be collected", error=str(error))
        await asyncio.sleep(interval_seconds)
