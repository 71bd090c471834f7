"""How a call is made: key, deadline, repeats where a repeat is safe, and typed errors."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from loraline.client import tracing
from loraline.client.connection import Connection
from loraline.client.errors import LoralineApiError, from_rpc_error

UNARY_SECONDS = 60.0
"""Deadline of a call that only reads or writes records."""
WORK_SECONDS = 1800.0
"""Deadline of a call that loads, proves, generates or verifies."""
NEVER_REACHED_SECONDS = 1.0
"""How long a server that never answered is tried: long enough for a hiccup, short enough for a person to wait."""
LOST_SECONDS = 120.0
"""How long a server that did answer before is tried: long enough for a restart."""


@dataclass
class Endpoint:
    """One server: its channel, and whether it has ever answered."""

    address: str
    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = ()
    reached: bool = False
    lost_seconds: float = LOST_SECONDS

    def patience(self) -> Patience:
        """Return a fresh allowance of repeats."""
        return Patience(self.lost_seconds if self.reached else min(NEVER_REACHED_SECONDS, self.lost_seconds))

    async def unary(
        self,
        method: Callable[..., Any],
        request: Any,
        *,
        idempotent: bool = True,
        timeout: float = UNARY_SECONDS,  # noqa: ASYNC109 - a gRPC deadline, sent to the server
    ) -> Any:
        """Make a call; repeat it while no server answers and a repeat changes nothing."""
        patience = self.patience()
        while True:
            try:
                reply = await method(request, timeout=timeout, metadata=self.metadata + tracing.headers())
            except grpc.aio.AioRpcError as error:
                failure = self.failed(error)
                if not (idempotent and may_repeat(failure)):
                    raise failure from None
                await patience.wait_or_raise(failure)
            else:
                self.reached = True
                return reply

    async def stream(self, method: Callable[..., Any], request: Any) -> AsyncIterator[Any]:
        """Make a call that answers with a stream; cancel it on the server when the reader goes away."""
        call = method(request, metadata=self.metadata + tracing.headers())
        try:
            async for message in call:
                self.reached = True
                yield message
        except grpc.aio.AioRpcError as error:
            raise self.failed(error) from None
        finally:
            call.cancel()

    def failed(self, error: grpc.aio.AioRpcError) -> LoralineApiError:
        """Return the typed error, and remember whether a server spoke."""
        failure = from_rpc_error(error, self.address)
        if not failure.unreachable:
            self.reached = True
        return failure


def may_repeat(failure: LoralineApiError) -> bool:
    """Whether trying again may help: nobody answered, or the server itself said to come back."""
    unavailable = failure.code is grpc.StatusCode.UNAVAILABLE
    return unavailable and (failure.unreachable or failure.retry_after is not None)


@dataclass
class Patience:
    """Waits between repeats, doubling with jitter, until the time is used up."""

    seconds: float
    _started: float = field(default_factory=time.monotonic)
    _delay: float = 0.1

    async def wait_or_raise(self, failure: LoralineApiError) -> None:
        """Wait before the next try, or raise the failure when the time is used up."""
        if time.monotonic() - self._started + self._delay > self.seconds:
            raise failure
        await asyncio.sleep(self._delay * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, no secret
        self._delay = min(self._delay * 2, 2.0)


class Endpoints:
    """The servers of a connection; stages at one address share a channel."""

    def __init__(self, connection: Connection, lost_seconds: float = LOST_SECONDS):
        self.connection = connection
        self._lost_seconds = lost_seconds
        self._by_address: dict[str, Endpoint] = {}

    def of(self, stage: str) -> Endpoint:
        """Return a stage's server; opens its channel at first use."""
        address = self.connection.addresses[stage]
        if address not in self._by_address:
            metadata = (("authorization", f"Bearer {self.connection.key}"),) if self.connection.key else ()
            channel = self.connection.channel(address)
            self._by_address[address] = Endpoint(address, channel, metadata, lost_seconds=self._lost_seconds)
        return self._by_address[address]

    def of_job(self, job: str) -> Endpoint:
        """Return the server of the stage that a job's name tells; any server for a name that tells none."""
        stage = re.split("[.-]", job, maxsplit=1)[0]
        return self.of(stage if stage in self.connection.addresses else "trainer")

    async def close(self) -> None:
        """Close all channels."""
        for endpoint in self._by_address.values():
            await endpoint.channel.close(None)
        self._by_address.clear()


async def pages(fetch: Callable[[str], Any], items: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """Go through all pages of a list call; `fetch` takes a page token, `items` picks a reply's entries."""
    token = ""
    while True:
        reply = await fetch(token)
        for item in items(reply):
            yield item
        token = reply.next_page_token
        if not token:
            return
