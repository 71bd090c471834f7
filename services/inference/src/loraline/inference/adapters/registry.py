"""The adapters of one engine: checked, loaded, proven, swapped out when there is no room."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import structlog

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, failed_precondition, invalid_argument, resource_exhausted
from loraline.inference.adapters.checks import check_adapter
from loraline.inference.adapters.names import internal_name, served_name
from loraline.inference.adapters.proof import Evidence, Proof, prove_adapter, prove_without_evidence, read_evidence
from loraline.inference.base_model import LocalBase
from loraline.inference.engine_errors import engine_gone
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.port import Engine, EngineDead, EngineRefused
from loraline.inference.metrics import InferenceMetrics

_log = structlog.get_logger(__name__)


@dataclass
class ServedAdapter:
    """An adapter that can be asked; in the engine now, or loaded again at first use."""

    ref: ArtifactRef
    """Exact."""
    internal: str
    rank: int
    proof: Proof
    wants_system: bool = False
    """Whether it was trained on conversations with a system prompt."""
    resident: bool = True
    load_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    users: int = 0
    """Requests that it answers now."""
    free: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it answers none."""
    last_used: int = 0

    def __post_init__(self) -> None:
        self.free.set()

    @property
    def name(self) -> str:
        """Its name in requests, with version."""
        return served_name(self.ref)


class AdapterRegistry:
    """Owns what the engine holds; the only one that loads and unloads adapters."""

    def __init__(
        self,
        engine: Engine,
        base: LocalBase,
        chat_format: ChatFormat,
        library: ArtifactLibrary,
        metrics: InferenceMetrics,
        *,
        limit: int,
        require_proof: bool,
    ):
        self._engine = engine
        self._base = base
        self._format = chat_format
        self._library = library
        self._metrics = metrics
        self._limit = limit
        self._require_proof = require_proof
        self._adapters: dict[str, ServedAdapter] = {}
        self._leaving: dict[str, ServedAdapter] = {}
        """Unloaded, but answering requests that began before; still in the engine."""
        self._departures: set[asyncio.Task[None]] = set()
        metrics.forget_adapters()
        self._ticks = itertools.count(1)
        # One load at a time: loads are rare, and two that both look for room would each count the other's.
        self._loading = asyncio.Lock()

    def list(self) -> list[ServedAdapter]:
        """Return all adapters that can be asked, by name."""
        return sorted(self._adapters.values(), key=lambda adapter: (adapter.ref.name, adapter.ref.version))

    def get(self, exact: ArtifactRef) -> ServedAdapter | None:
        """Return the adapter of an exact reference; None when it was never loaded."""
        return self._adapters.get(internal_name(exact))

    async def load(self, exact: ArtifactRef) -> ServedAdapter:
        """Load and prove an adapter; what is resident already is returned as it is.

        Raises FAILED_PRECONDITION with the check's or the proof's reason; the engine is then as before.
        """
        if exact.kind != artifact_pb2.ARTIFACT_KIND_ADAPTER:
            message = f"{format_ref(exact)} is no adapter. LoadModel serves models."
            raise invalid_argument("NOT_AN_ADAPTER", message, adapter__kind=message)
        async with self._loading:
            known = self._stay(exact) or self.get(exact)
            if known is not None and known.resident:
                return known
            try:
                adapter = await self._load(exact)
            except LoralineError as error:
                self._metrics.adapter_loads.labels(result=error.reason).inc()
                _log.warning("adapter_refused", adapter=format_ref(exact), reason=error.reason, message=error.message)
                raise
            self._metrics.adapter_loads.labels(result="loaded").inc()
            self._count()
            return adapter

    @asynccontextmanager
    async def use(self, exact: ArtifactRef) -> AsyncIterator[ServedAdapter]:
        """Hold an adapter in the engine for the length of one request, loading it when it is swapped out."""
        adapter = self.get(exact)
        # No await between finding it resident and counting its user: a swap cannot come between.
        while adapter is None or not adapter.resident:
            adapter = await self.load(exact)
        adapter.users += 1
        adapter.free.clear()
        adapter.last_used = next(self._ticks)
        outcome, begun = "ok", time.monotonic()
        try:
            yield adapter
        except LoralineError as error:
            outcome = error.reason
            raise
        except BaseException as error:
            outcome = "INTERNAL" if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            if internal_name(exact) in self._adapters:
                self._metrics.adapter_answered(adapter.name, outcome, time.monotonic() - begun)
            adapter.users -= 1
            if not adapter.users:
                adapter.free.set()

    async def unload(self, exact: ArtifactRef) -> None:
        """Forget an adapter; requests that it answers now finish first, and other adapters are loaded meanwhile.

        A caller that goes away does not keep it from leaving.
        """
        async with self._loading:  # it may just be coming back
            adapter = self._adapters.pop(internal_name(exact), None)
            if adapter is None:
                return
            self._leaving[adapter.internal] = adapter
        departure = asyncio.create_task(self._leave(adapter))
        self._departures.add(departure)
        departure.add_done_callback(self._departures.discard)
        await asyncio.shield(departure)

    async def _leave(self, adapter: ServedAdapter) -> None:
        await adapter.free.wait()  # without the lock: an answer takes minutes, and loads are waited for
        async with self._loading:
            if self._leaving.get(adapter.internal) is not adapter or adapter.users:
                return  # loaded again meanwhile
            del self._leaving[adapter.internal]
            with suppress(EngineDead):  # it went with the engine
                if adapter.resident:
                    await self._engine.unload_adapter(adapter.internal)
            self._metrics.forget_adapter(adapter.name)
            self._count()

    def _stay(self, exact: ArtifactRef) -> ServedAdapter | None:
        """Keep an adapter that is leaving, where it is wanted again: it is in the engine and proven."""
        adapter = self._leaving.pop(internal_name(exact), None)
        if adapter is not None:
            self._adapters[adapter.internal] = adapter
        return adapter

    async def _load(self, exact: ArtifactRef) -> ServedAdapter:
        what = format_ref(exact)
        folder = await asyncio.to_thread(self._library.fetch, exact)
        facts = await asyncio.to_thread(check_adapter, folder, self._base, self._engine.facts.max_lora_rank)
        internal = internal_name(exact)
        try:
            await self._engine.load_adapter(internal, folder)
        except EngineRefused as error:
            message = f"The engine does not take {what}: {error}"
            raise failed_precondition("ENGINE_REFUSED_ADAPTER", message, adapter=what) from error
        except EngineDead as error:
            raise engine_gone() from error
        try:
            evidence = await asyncio.to_thread(read_evidence, folder)
            proof = await self._prove(internal, evidence, what)
            await self._make_room(internal)
        except EngineDead as error:
            raise engine_gone() from error
        except BaseException:
            await self._engine.unload_adapter(internal)
            raise
        wants_system = evidence is not None and evidence.wants_system
        adapter = ServedAdapter(exact, internal, facts.rank, proof, wants_system, last_used=next(self._ticks))
        self._adapters[internal] = adapter
        _log.info("adapter_loaded", adapter=what, internal=internal, **vars(proof))
        return adapter

    async def _prove(self, internal: str, evidence: Evidence | None, what: str) -> Proof:
        if evidence is not None:
            return await prove_adapter(self._engine, self._format, internal, evidence, what)
        if self._require_proof:
            message = (
                f"{what} brings no probes.json and no token_receipt.json, so nothing can prove how it answers. "
                "Train it with this platform, or set LORALINE_INFERENCE_REQUIRE_PROOF=false to serve it unproven."
            )
            raise failed_precondition("NO_EVIDENCE", message, adapter=what)
        _log.warning("adapter_without_evidence", adapter=what)
        return await prove_without_evidence(self._engine, self._format, internal, what)

    async def _make_room(self, newcomer: str) -> None:
        """Swap out the least recently used adapter that answers nothing, until the newcomer fits."""
        while True:
            held = (*self._adapters.values(), *self._leaving.values())
            resident = [adapter for adapter in held if adapter.resident and adapter.internal != newcomer]
            if len(resident) < self._limit:
                return
            idle = [adapter for adapter in resident if adapter.users == 0]
            if not idle:
                message = (
                    f"All {self._limit} places for adapters are answering requests. Try again in a moment, or raise "
                    "LORALINE_INFERENCE_MAX_LOADED_ADAPTERS."
                )
                error = resource_exhausted("ADAPTER_PLACES_BUSY", message, limit=str(self._limit))
                error.retry_after = timedelta(seconds=1)
                raise error
            oldest = min(idle, key=lambda adapter: adapter.last_used)
            oldest.resident = False
            await self._engine.unload_adapter(oldest.internal)
            self._metrics.adapter_swaps.inc()
            _log.info("adapter_swapped_out", adapter=oldest.name)

    def _count(self) -> None:
        held = (*self._adapters.values(), *self._leaving.values())
        self._metrics.adapters.set(sum(adapter.resident for adapter in held))
