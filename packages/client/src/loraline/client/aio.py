"""The client for asyncio programs, and the real implementation of the other one."""

from __future__ import annotations

from collections.abc import Mapping

from loraline.client.calls import LOST_SECONDS, Endpoints
from loraline.client.connection import Tls, settle
from loraline.client.resources.artifacts import AsyncArtifacts
from loraline.client.resources.inference import AsyncInference
from loraline.client.resources.jobs import AsyncJobs
from loraline.client.resources.stages import AsyncDatagen, AsyncMerger, AsyncTrainer


class AsyncLoraline:
    """A connection to Loraline's servers: one address for all stages, or one for each.

    Make it with `connect` inside a running event loop, and close it (`async with` does). Every failed call raises
    LoralineApiError.
    """

    def __init__(self, endpoints: Endpoints):
        self._endpoints = endpoints
        self.jobs = AsyncJobs(endpoints)
        self.artifacts = AsyncArtifacts(endpoints)
        self.datagen = AsyncDatagen(endpoints)
        self.trainer = AsyncTrainer(endpoints)
        self.merger = AsyncMerger(endpoints)
        self.inference = AsyncInference(endpoints)

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        key: str | None = None,
        *,
        addresses: Mapping[str, str] | None = None,
        tls: Tls | bool | None = None,
        lost_seconds: float = LOST_SECONDS,
    ) -> AsyncLoraline:
        """Return a client; what is not given comes from the environment (see `loraline.client.connection.settle`).

        Nothing is sent yet: a server that is not there shows at the first call. `lost_seconds` is how long a server
        that answered before is looked for when it goes away.
        """
        return cls(Endpoints(settle(address, key, addresses=addresses, tls=tls), lost_seconds))

    @property
    def addresses(self) -> Mapping[str, str]:
        """The address of each stage."""
        return self._endpoints.connection.addresses

    async def close(self) -> None:
        """Close the connections."""
        await self._endpoints.close()

    async def __aenter__(self) -> AsyncLoraline:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
