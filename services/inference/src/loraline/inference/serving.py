"""One served base model: its engine, its chat format, its adapters, and who uses them now."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.errors import LoralineError, failed_precondition
from loraline.inference.adapters.proof import Proof, prove_merged, read_evidence
from loraline.inference.adapters.registry import AdapterRegistry
from loraline.inference.base_model import LocalBase
from loraline.inference.config import InferenceSettings
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.choice import EngineChoice
from loraline.inference.engines.port import Engine, EngineDead, EngineRefused, EngineRequest, Sampling
from loraline.inference.engines.tool_calls import check_parser
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.preflight.diagnosis import Diagnoses

_log = structlog.get_logger(__name__)


@dataclass
class Serving:
    """What answers requests until another base model is loaded."""

    engine: Engine
    base: LocalBase
    name: str
    """Name of the base in requests."""
    chat_format: ChatFormat
    adapters: AdapterRegistry
    proof: Proof | None = None
    """Set when the base is a merged model that brings evidence."""
    wants_system: bool = False
    """Whether such a model's training rows begin with a system prompt."""
    load_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    last_token: float = field(default_factory=time.monotonic)
    """When the engine last gave a token to a request, by the monotonic clock."""
    _users: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def serves(self, base: LocalBase, name: str) -> bool:
        """Tell whether an artifact is what is served already."""
        return bool(base.digest) and self.base.digest == base.digest and self.name == name

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Count a request in flight; a change of the model waits for it."""
        self._users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def drained(self, seconds: float) -> bool:
        """Wait until no request is in flight, at most so long; return whether it came to that."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            _log.warning("requests_cut", in_flight=self._users, waited_seconds=seconds)
            return False
        return True


@dataclass(frozen=True)
class Target:
    """Who answers a request."""

    serving: Serving
    adapter: str
    """Internal name; empty for the base."""
    name: str
    """Name to show, with version."""
    wants_system: bool = False
    """Whether it was trained on conversations that begin with a system prompt, as its token receipt shows."""

    @property
    def kind(self) -> str:
        """`base` or `adapter`."""
        return "adapter" if self.adapter else "base"


async def start_serving(
    base: LocalBase,
    name: str,
    choice: EngineChoice,
    settings: InferenceSettings,
    library: ArtifactLibrary,
    metrics: InferenceMetrics,
    phase: Callable[[str], None],
    diagnoses: Diagnoses,
) -> Serving:
    """Start an engine on a base model and see it generate a token; a merged model's evidence is checked too.

    `phase` is told what is being done, in words. Raises MODEL_LOAD_FAILED, RECEIPT_MISMATCH or PROOF_FAILED; nothing is
    left running then.
    """
    begun = time.monotonic()
    await asyncio.to_thread(check_parser, settings.tool_parser)
    await diagnoses.before(choice.name, base.described, base.doubts)
    phase("reading the tokenizer")
    chat_format = await asyncio.to_thread(ChatFormat.load, base.folder, trust_remote_code=base.spec.trust_remote_code)
    engine = choice.create()
    options = settings.engine_options(trust_remote_code=base.spec.trust_remote_code)
    try:
        phase(f"starting {choice.name} and bringing the weights into memory")
        await engine.start(base.folder, options)
        phase("generating the first token")
        await generate_one_token(engine, chat_format)
        phase("proving a merged model's answers")
        evidence = await asyncio.to_thread(read_evidence, base.folder)
        proof = await prove_merged(engine, chat_format, evidence, base.described) if evidence else None
    except BaseException as error:
        await asyncio.shield(engine.stop())
        if isinstance(error, LoralineError) or not isinstance(error, Exception):
            raise
        raise diagnoses.failed(choice.name, base.described, error) from error
    diagnoses.settings_in_force(engine.facts)
    seconds = time.monotonic() - begun
    metrics.load_seconds.observe(seconds)
    _log.info("model_loaded", model=base.described, name=name, seconds=round(seconds, 1), **vars(engine.facts))
    registry = AdapterRegistry(
        engine,
        base,
        chat_format,
        library,
        metrics,
        limit=settings.max_loaded_adapters,
        require_proof=settings.require_proof,
    )
    wants_system = evidence is not None and evidence.wants_system
    return Serving(engine, base, name, chat_format, registry, proof, wants_system)


async def generate_one_token(engine: Engine, chat_format: ChatFormat) -> None:
    """See that the engine answers: readiness means that it generates, not that a process exists."""
    ids = await asyncio.to_thread(chat_format.encode, "Hello")
    request = EngineRequest(f"ready-{uuid.uuid4().hex}", ids, Sampling(max_tokens=1, temperature=0.0))
    try:
        async with aclosing(engine.generate(request)) as pieces:
            async for piece in pieces:
                if piece.token_ids:
                    return
    except EngineRefused as error:
        raise failed_precondition("MODEL_LOAD_FAILED", f"The engine refuses its first prompt: {error}") from error
    raise EngineDead("the engine answered without a token")
