"""What the service serves now: loads, replaces, restarts and remembers it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import structlog

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import AliasChange, ArtifactRef
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.refs import check_new_alias, format_ref, parse_ref
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError, failed_precondition
from loraline.inference.adapters.names import AdapterNames, adapter_ref
from loraline.inference.adapters.registry import ServedAdapter
from loraline.inference.base_model import LocalBase, describe_base, open_base, parse_base
from loraline.inference.catalogue import aliases_of, is_base, not_served, served_aliases
from loraline.inference.config import InferenceSettings
from loraline.inference.engine_watch import WHY, Backoff, EngineWatch, Failure
from loraline.inference.engines.choice import EngineChoice, choose
from loraline.inference.engines.port import BASE
from loraline.inference.holds import Holds
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.preflight.diagnosis import Diagnoses
from loraline.inference.readiness import Readiness, cause_of
from loraline.inference.serving import Serving, Target, start_serving
from loraline.inference.state import ServedState, StateFile, content_of

_log = structlog.get_logger(__name__)


class ModelHost:
    """Owns the engine's life. Requests come through `target`; operators through the load methods."""

    def __init__(
        self,
        settings: InferenceSettings,
        core: CoreSettings,
        library: ArtifactLibrary,
        metrics: InferenceMetrics,
        choose_engine: Callable[[str], EngineChoice] = choose,
    ):
        self.settings = settings
        self._core = core
        self._library = library
        self._metrics = metrics
        self._choose = choose_engine
        self._names = AdapterNames(library, settings.alias_cache_seconds)
        self._file = StateFile(core.data_dir / "inference" / "state.json")
        self._state = ServedState()
        self._serving: Serving | None = None
        self._changing = asyncio.Lock()
        self._readiness = Readiness()
        self.diagnoses = Diagnoses(settings, self._readiness, core.data_dir)
        self._holds = Holds(library.database, lambda: self._serving)
        self._watch = EngineWatch(settings, lambda: None if self._changing.locked() else self._serving, self._restart)
        self._backoff = Backoff(settings.restart_backoff_seconds)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def why_not_ready(self) -> str:
        """Empty when requests are answered; otherwise why not and what to do."""
        return self._readiness.why_not

    @property
    def concurrency(self) -> int:
        """Answers that the engine generates at once; 0 while none runs or it does not say."""
        return self._serving.engine.facts.concurrency if self._serving is not None else 0

    async def start(self) -> None:
        """Begin to load the configured or the remembered model, and to watch the engine."""
        self._state = await asyncio.to_thread(self._file.read)
        wanted = parse_base(self.settings.model) if self.settings.model else self._state.model
        if wanted is None:
            self._readiness.empty()
        else:
            self._readiness.loading(f"Loading {describe_base(wanted)}.")
        try:
            self._choose(self.settings.engine)
        except LoralineError as error:
            self._readiness.failed(error.message, error.reason)
            _log.error("no_engine", message=error.message)
            return
        for work in (self._load_first(wanted), self._watch.keep(), self._holds.keep()):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End everything, the engine's processes too."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._readiness.loading("The service is stopping.")
        serving, self._serving = self._serving, None
        await self._holds.release()
        if serving is not None:
            await serving.engine.stop()

    def serving(self) -> Serving:
        """Return what is served; UNAVAILABLE while one is loaded, FAILED_PRECONDITION for none or a failed load."""
        if self._serving is not None and self._readiness.state == "ready":
            return self._serving
        raise self._readiness.refusal()

    @asynccontextmanager
    async def target(self, model: str) -> AsyncIterator[Target]:
        """Hold who answers requests for a model name, for the length of one request."""
        serving = self.serving()
        async with serving.in_use():
            if is_base(serving, model):
                yield Target(serving, BASE, serving.name, serving.wants_system)
                return
            exact = await self._resolve(serving, model)
            fresh = serving.adapters.get(exact) is None
            async with serving.adapters.use(exact) as adapter:
                if fresh:
                    await self._holds.renew()
                yield Target(serving, adapter.internal, adapter.name, adapter.wants_system)

    async def served_name(self, model: str) -> str:
        """Return the name with version of what is loaded under a request's model name; NOT_FOUND otherwise."""
        serving = self.serving()
        if is_base(serving, model):
            return serving.name
        adapter = serving.adapters.get(await self._resolve(serving, model))
        if adapter is None:
            raise await self._not_served(serving, model)
        return adapter.name

    async def load_model(self, spec: BaseModel, served_name: str = "", *, trusted: bool = False) -> Serving:
        """Serve another base model, after the requests in flight; when it fails, the one before is served again."""
        choice = self._choose(self.settings.engine)
        base = await asyncio.to_thread(open_base, spec, self._library, self._core, trusted=trusted)
        name = served_name or base.default_name
        async with self._changing:
            current = self._serving
            if current is not None and not self.why_not_ready and current.serves(base, name):
                return current
            return await self._replace(base, name, choice)

    async def load_adapter(self, ref: ArtifactRef) -> ServedAdapter:
        """Load and prove an adapter, and remember it."""
        serving = self.serving()
        async with serving.in_use():
            exact = await self._names.resolve(ref)
            adapter = await serving.adapters.load(exact)
        if content_of(exact) in self._state.withdrawn:
            self._state.withdrawn.remove(content_of(exact))
        await self._remember(serving)
        return adapter

    async def unload_adapter(self, model: str) -> None:
        """Take an adapter out: requests that name it are refused until it is loaded again."""
        serving = self.serving()
        ref = adapter_ref(model)
        exact = await self._names.resolve(ref) if ref is not None else None
        if exact is None or serving.adapters.get(exact) is None:
            raise await self._not_served(serving, model)
        self._state.withdrawn = [*self._state.withdrawn, content_of(exact)][-1000:]
        await serving.adapters.unload(exact)
        await self._remember(serving)

    async def set_alias(self, ref: ArtifactRef, alias: str, actor: str) -> tuple[ServedAdapter, AliasChange]:
        """Load and prove an adapter, then move the alias to it."""
        check_new_alias(alias)
        adapter = await self.load_adapter(ref)
        change = await asyncio.to_thread(self._library.set_alias, adapter.ref, alias, actor)
        self._names.forget()
        return adapter, change

    async def rollback(self, name: str, alias: str, actor: str) -> tuple[ServedAdapter, AliasChange]:
        """Move an alias back to the version it pointed at before its last move."""
        kind = artifact_pb2.ARTIFACT_KIND_ADAPTER
        changes, _ = await asyncio.to_thread(self._library.alias_changes, kind, name, alias, 1)
        if not changes or not changes[0].from_version:
            message = f"adapter/{name}@{alias} has never pointed anywhere else, so there is nothing to go back to."
            raise failed_precondition("NOTHING_TO_ROLL_BACK", message, name=name, alias=alias)
        before = ArtifactRef(kind=kind, name=name, version=changes[0].from_version)
        return await self.set_alias(before, alias, actor)

    async def aliases(self, ref: ArtifactRef) -> list[str]:
        """Return the aliases that point at an exact artifact now."""
        return (await asyncio.to_thread(aliases_of, self._library, [ref]))[0]

    async def served_aliases(self) -> dict[str, str]:
        """Return alias name -> name with version, of the adapters that are loaded now."""
        return await served_aliases(self._library, self.serving())

    async def _resolve(self, serving: Serving, model: str) -> ArtifactRef:
        ref = adapter_ref(model)
        if ref is None:
            raise await self._not_served(serving, model)
        try:
            exact = await self._names.resolve(ref)
        except LoralineError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise  # a database that is away says nothing about what is served
            raise await self._not_served(serving, model) from error
        known = serving.adapters.get(exact) is not None
        if not known and (not self.settings.load_on_first_use or content_of(exact) in self._state.withdrawn):
            raise await self._not_served(serving, model)
        return exact

    async def _not_served(self, serving: Serving, model: str) -> LoralineError:
        return not_served(serving, model, await served_aliases(self._library, serving))

    async def _replace(self, base: LocalBase, name: str, choice: EngineChoice) -> Serving:
        """Stop what is served, start the other; the lock is held."""
        before = self._serving
        self.diagnoses.lost = None  # it was the engine of the model before
        self._readiness.loading(f"Loading {base.described}; requests are answered again when it generates.")
        _log.info("engine_chosen", engine=choice.name, why=choice.why)
        if before is not None:
            await before.drained(self.settings.drain_seconds)
            self._serving = None
            await before.engine.stop()
        try:
            serving = await self._start(base, name, choice)
        except BaseException as error:
            why = str(error) or f"Loading {base.described} was given up."
            self._readiness.failed(why, cause_of(error))
            if before is not None and isinstance(error, LoralineError):
                await self._go_back(before, choice)
            raise
        self._serving = serving
        self._readiness.ready()
        await self._remember(serving)
        return serving

    async def _start(self, base: LocalBase, name: str, choice: EngineChoice, why: str = "") -> Serving:
        def phase(text: str) -> None:
            self._readiness.loading(f"{why}Loading {base.described}: {text}.")

        known = (self.settings, self._library, self._metrics, phase, self.diagnoses)
        return await start_serving(base, name, choice, *known)

    async def _go_back(self, before: Serving, choice: EngineChoice, why: str = "") -> None:
        _log.warning("serving_model_before", model=before.base.described)
        adapters = [format_ref(adapter.ref) for adapter in before.adapters.list()]
        try:
            self._serving = await self._start(before.base, before.name, choice, why)
        except LoralineError as error:
            _log.error("model_before_failed", reason=error.reason, message=error.message)
            return
        await self._load_adapters(self._serving, adapters)
        self._readiness.ready()

    async def _load_first(self, wanted: BaseModel | None) -> None:
        if wanted is None:
            return
        remembered = list(self._state.adapters)
        try:
            serving = await self.load_model(wanted, self.settings.served_name or self._state.served_name, trusted=True)
        except LoralineError as error:
            self._readiness.failed(f"{describe_base(wanted)} could not be loaded: {error.message}", cause_of(error))
            _log.error("first_model_failed", reason=error.reason, message=error.message)
            return
        await self._load_adapters(serving, remembered)
        await self._remember(serving)

    async def _load_adapters(self, serving: Serving, adapters: list[str]) -> None:
        for text in adapters[-self.settings.max_loaded_adapters :]:
            try:
                await serving.adapters.load(await self._names.resolve(parse_ref(text)))
            except LoralineError as error:
                _log.warning("adapter_not_back", adapter=text, reason=error.reason, message=error.message)

    async def _restart(self, serving: Serving, failure: Failure) -> None:
        """Start an engine again that died or hangs, waiting longer after each failure."""
        async with self._changing:
            if self._serving is not serving:
                return
            words = await asyncio.to_thread(serving.engine.last_words)
            why = self.diagnoses.died(WHY[failure], words)
            self._readiness.loading(why)
            _log.error("engine_lost", failure=failure, model=serving.base.described, said=words)
            self._metrics.engine_restarts.labels(cause=failure).inc()
            self._serving = None
            await serving.engine.stop()  # requests in flight are told so
        while self._serving is None:
            await self._backoff.wait()
            async with self._changing:  # let go of between the tries: an operator may load another model
                if self._serving is None:
                    self._readiness.loading(why)
                    await self._go_back(serving, self._choose(self.settings.engine), f"{why} ")

    async def _remember(self, serving: Serving) -> None:
        self._state.model, self._state.served_name = serving.base.spec, serving.name
        self._state.adapters = [format_ref(adapter.ref) for adapter in serving.adapters.list()]
        await asyncio.to_thread(self._file.write, self._state)
        await self._holds.renew()
