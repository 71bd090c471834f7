"""The client for scripts and notebooks: `AsyncLoraline` behind blocking calls."""

from __future__ import annotations

from collections.abc import Mapping

from loraline.client.aio import AsyncLoraline
from loraline.client.blocking import Blocking, LoopThread, blocking, blocking_stream
from loraline.client.calls import LOST_SECONDS
from loraline.client.connection import Tls
from loraline.client.resources.artifacts import AsyncArtifacts
from loraline.client.resources.inference import AsyncInference
from loraline.client.resources.jobs import AsyncJobs
from loraline.client.resources.stages import AsyncDatagen, AsyncMerger, AsyncTrainer


class Jobs(Blocking[AsyncJobs]):
    """`client.jobs`; see AsyncJobs."""

    get = blocking(AsyncJobs.get)
    list = blocking(AsyncJobs.list)
    watch = blocking_stream(AsyncJobs.watch)
    wait = blocking(AsyncJobs.wait)
    result = blocking(AsyncJobs.result)
    cancel = blocking(AsyncJobs.cancel)
    pause = blocking(AsyncJobs.pause)
    resume = blocking(AsyncJobs.resume)
    delete = blocking(AsyncJobs.delete)


class Artifacts(Blocking[AsyncArtifacts]):
    """`client.artifacts`; see AsyncArtifacts."""

    show = blocking(AsyncArtifacts.show)
    list = blocking(AsyncArtifacts.list)
    upload = blocking(AsyncArtifacts.upload)
    download = blocking(AsyncArtifacts.download)
    verify = blocking(AsyncArtifacts.verify)
    delete = blocking(AsyncArtifacts.delete)
    set_alias = blocking(AsyncArtifacts.set_alias)
    delete_alias = blocking(AsyncArtifacts.delete_alias)
    alias_changes = blocking(AsyncArtifacts.alias_changes)


class Datagen(Blocking[AsyncDatagen]):
    """`client.datagen`; see AsyncDatagen."""

    convert = blocking(AsyncDatagen.convert)
    generate = blocking(AsyncDatagen.generate)
    check = blocking(AsyncDatagen.check)
    preview = blocking(AsyncDatagen.preview)
    probe_endpoint = blocking(AsyncDatagen.probe_endpoint)
    recipes = blocking(AsyncDatagen.recipes)


class Trainer(Blocking[AsyncTrainer]):
    """`client.trainer`; see AsyncTrainer."""

    train = blocking(AsyncTrainer.train)
    plan = blocking(AsyncTrainer.plan)
    diagnose = blocking(AsyncTrainer.diagnose)
    diagnose_file = blocking(AsyncTrainer.diagnose_file)
    run = blocking(AsyncTrainer.run)
    runs = blocking(AsyncTrainer.runs)
    import_model = blocking(AsyncTrainer.import_model)
    create_tiny_model = blocking(AsyncTrainer.create_tiny_model)


class Merger(Blocking[AsyncMerger]):
    """`client.merger`; see AsyncMerger."""

    merge = blocking(AsyncMerger.merge)
    check = blocking(AsyncMerger.check)
    repair = blocking(AsyncMerger.repair)
    export = blocking(AsyncMerger.export)


class Inference(Blocking[AsyncInference]):
    """`client.inference`; see AsyncInference."""

    chat = blocking_stream(AsyncInference.chat)
    answer = blocking(AsyncInference.answer)
    generate = blocking(AsyncInference.generate)
    models = blocking(AsyncInference.models)
    profiles = blocking(AsyncInference.profiles)
    load_model = blocking(AsyncInference.load_model)
    load_adapter = blocking(AsyncInference.load_adapter)
    unload_adapter = blocking(AsyncInference.unload_adapter)
    set_alias = blocking(AsyncInference.set_alias)
    rollback = blocking(AsyncInference.rollback)
    capabilities = blocking(AsyncInference.capabilities)
    create_session = blocking(AsyncInference.create_session)
    session = blocking(AsyncInference.session)
    sessions = blocking(AsyncInference.sessions)
    reset_session = blocking(AsyncInference.reset_session)
    delete_session = blocking(AsyncInference.delete_session)


class Loraline:
    """A connection to Loraline's servers, for blocking code; `with` closes it. Every failure is a LoralineApiError."""

    def __init__(self, thread: LoopThread, client: AsyncLoraline):
        self._thread = thread
        self._client = client
        self.jobs = Jobs(thread, client.jobs)
        self.artifacts = Artifacts(thread, client.artifacts)
        self.datagen = Datagen(thread, client.datagen)
        self.trainer = Trainer(thread, client.trainer)
        self.merger = Merger(thread, client.merger)
        self.inference = Inference(thread, client.inference)

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        key: str | None = None,
        *,
        addresses: Mapping[str, str] | None = None,
        tls: Tls | bool | None = None,
        lost_seconds: float = LOST_SECONDS,
    ) -> Loraline:
        """Return a client; arguments as in `AsyncLoraline.connect`."""
        thread = LoopThread()

        async def open_client() -> AsyncLoraline:
            return AsyncLoraline.connect(address, key, addresses=addresses, tls=tls, lost_seconds=lost_seconds)

        try:
            return cls(thread, thread.run(open_client()))
        except BaseException:
            thread.close()
            raise

    @property
    def addresses(self) -> Mapping[str, str]:
        """The address of each stage."""
        return self._client.addresses

    def close(self) -> None:
        """Close the connections."""
        self._thread.run(self._client.close())
        self._thread.close()

    def __enter__(self) -> Loraline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
