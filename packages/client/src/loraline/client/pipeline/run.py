"""Runs a pipeline: every stage as soon as what it needs is there, nothing twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client import tracing
from loraline.client.aio import AsyncLoraline
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline import serving
from loraline.client.pipeline.checklist import tell_doubts
from loraline.client.pipeline.plan import PlannedStage, plan
from loraline.client.pipeline.report import AskedPrompt, Observer, PipelineReport, StageOutcome
from loraline.client.pipeline.spec import DatasetRequest, PipelineSpec, artifact_place
from loraline.client.pipeline.stagejobs import StageJobs


@dataclass
class StageFailed(Exception):
    """A stage that ended a run. `running` names jobs of other stages that go on, `also` others that failed with it."""

    stage: str
    error: LoralineApiError
    running: dict[str, str] = field(default_factory=dict)
    also: dict[str, LoralineApiError] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.stage}: {self.error}"


@dataclass(frozen=True)
class ExistingRunRule:
    """What becomes of an earlier run of the pipeline's name when another is to start."""

    told: trainer_pb2.ExistingRunPolicy.ValueType = trainer_pb2.EXISTING_RUN_POLICY_UNSPECIFIED
    """Goes before what the file says; UNSPECIFIED leaves it to the file."""
    ask: Callable[[trainer_pb2.Run], Awaitable[trainer_pb2.ExistingRunPolicy.ValueType]] | None = None
    """Asks a person, where neither says it; without one the earlier run is kept aside (BACKUP_AND_RESTART)."""


class PipelineRun:
    """One run of a pipeline against the servers of a client."""

    def __init__(
        self,
        client: AsyncLoraline,
        spec: PipelineSpec,
        observer: Observer,
        existing: ExistingRunRule = ExistingRunRule(),
    ):
        self._existing = existing
        self._client = client
        self._spec = spec
        self._observer = observer
        self._jobs = StageJobs(client, spec.name, observer)
        self._outcomes: dict[str, StageOutcome] = {}
        self._answers: list[AskedPrompt] = []

    @property
    def live_jobs(self) -> dict[str, str]:
        """Jobs that this run waits for now, by stage; they go on when the run is left."""
        return dict(self._jobs.live)

    async def run(self) -> PipelineReport:
        """Run all stages; StageFailed tells the first that did not succeed."""
        started = time.monotonic()
        stages = plan(self._spec)
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for stage in stages:
                    waits = [tasks[name] for name in stage.needs]
                    tasks[stage.name] = group.create_task(self._stage(stage, waits))
        except* StageFailed as failures:
            first, *others = _all(failures)
            # Only now are all siblings known: one may have been about to start when the first stage failed.
            first.running = {stage: job for stage, job in self.live_jobs.items() if stage != first.stage}
            first.also = {other.stage: other.error for other in others}
            raise first from None
        outcomes = [self._outcomes[stage.name] for stage in stages]
        markers = self._spec.ask.markers if self._spec.ask is not None else ()
        seconds = time.monotonic() - started
        return PipelineReport(self._spec.name, outcomes, self._answers, markers, seconds, _owed(self._spec))

    async def _stage(self, stage: PlannedStage, waits: list[asyncio.Task[None]]) -> None:
        for task in waits:
            await task
        self._observer.started(stage.name, stage.what)
        work, _, part = stage.name.partition(":")
        actions: dict[str, Callable[[str], Awaitable[StageOutcome]]] = {
            "source": self._source,
            "base_model": self._base_model,
            "dataset": self._dataset,
            "train": self._train,
            "merge": self._merge,
            "serve": self._serve,
            "ask": self._ask,
        }
        try:
            with tracing.span(stage.name):
                outcome = await actions[work](part)
        except LoralineApiError as error:
            raise StageFailed(stage.name, error) from error
        self._outcomes[stage.name] = outcome
        self._observer.finished(outcome)

    def _made(self, stage: str) -> artifact_pb2.ArtifactRef:
        artifact = self._outcomes[stage].artifact
        assert artifact is not None  # noqa: S101 - these stages make one
        return artifact.ref

    async def _source(self, part: str) -> StageOutcome:
        started = time.monotonic()
        stage = f"source:{part}"
        upload = await self._client.artifacts.upload(
            self._spec.sources[part],
            self._spec.artifact_name(part),
            progress=lambda done, total: self._observer.sent(stage, done, total),
        )
        if upload.skipped:
            self._observer.remark(stage, f"left out hidden files: {', '.join(upload.skipped[:5])}")
        how = "already done" if upload.unchanged else ""
        seconds = time.monotonic() - started
        return StageOutcome(stage, how, artifact=upload.artifact, seconds=0.0 if how else seconds)

    async def _base_model(self, _: str) -> StageOutcome:
        base = self._spec.base_model
        if base.existing is not None:
            return await self._existing_base(base.existing)
        request = trainer_pb2.CreateTinyModelRequest()
        request.CopyFrom(base.tiny or request)
        texts = [self._made(f"source:{name}") for name in base.tiny_texts]

        def finish(message: trainer_pb2.CreateTinyModelRequest) -> None:
            message.tokenizer_texts.extend(texts)

        start = self._client.trainer.create_tiny_model
        inputs = [("text", ref) for ref in texts]
        return await self._jobs.run("base_model", "trainer", start, request, inputs, trainer_pb2.ModelResult, finish)

    async def _existing_base(self, model: trainer_pb2.BaseModel) -> StageOutcome:
        outcome = StageOutcome("base_model", how="already done")
        if model.WhichOneof("source") == "artifact":
            outcome.artifact = await self._client.artifacts.show(model.artifact)
        else:
            outcome.detail = model.hub_id or model.path
        return outcome

    def _base(self) -> trainer_pb2.BaseModel:
        """Return the base as requests name it: the artifact made or resolved, or the Hub id or path of the file."""
        if self._outcomes["base_model"].artifact is not None:
            return trainer_pb2.BaseModel(artifact=self._made("base_model"))
        assert self._spec.base_model.existing is not None  # noqa: S101 - an outcome without artifact names one
        return self._spec.base_model.existing

    async def _dataset(self, part: str) -> StageOutcome:
        spec, stage = self._spec.datasets[part], f"dataset:{part}"
        if spec.artifact is not None:
            return StageOutcome(stage, "already done", artifact=await self._client.artifacts.show(spec.artifact))
        assert spec.request is not None  # noqa: S101 - a dataset is there already or is made
        request = type(spec.request)()
        request.CopyFrom(spec.request)  # type: ignore[arg-type]
        request.name = self._spec.artifact_name(part)
        convert = isinstance(request, datagen_pb2.ConvertDatasetRequest)
        made = [(number, self._made(f"source:{source}")) for number, source in spec.sources]
        inputs = [("source" if convert else f"source {number}", ref) for number, ref in made]

        def finish(message: DatasetRequest) -> None:
            for number, ref in made:
                artifact_place(message, number).CopyFrom(ref)

        start = self._client.datagen.convert if convert else self._client.datagen.generate
        return await self._jobs.run(stage, "datagen", start, request, inputs, datagen_pb2.DatasetResult, finish)

    async def _train(self, _: str) -> StageOutcome:
        spec = self._spec.train
        assert spec is not None  # noqa: S101 - planned only when there is one
        request = trainer_pb2.TrainRequest()
        request.CopyFrom(spec.request)
        request.name = self._spec.artifact_name()
        base, inputs = self._base(), []
        if base.WhichOneof("source") == "artifact":
            inputs.append(("base", base.artifact))
        else:
            request.base_model.CopyFrom(base)
        for name, weight in spec.weights.items():
            inputs.append((f"dataset {name} x {weight:g}", self._made(f"dataset:{name}")))
        contract = await self._contract()

        def finish(message: trainer_pb2.TrainRequest) -> None:
            message.base_model.CopyFrom(base)
            for name, weight in spec.weights.items():
                message.datasets.add(ref=self._made(f"dataset:{name}"), weight=weight)
            if contract is not None:
                message.serving_contract.CopyFrom(contract)

        start = self._client.trainer.train
        result = trainer_pb2.TrainResult
        return await self._jobs.run("train", "trainer", start, request, inputs, result, finish, self._before_training)

    async def _before_training(self, request: trainer_pb2.TrainRequest) -> None:
        """Say what becomes of an earlier run of this name, where the file does not: told, asked, or kept aside."""
        if self._existing.told:
            request.existing_run = self._existing.told
        if not request.existing_run:
            request.existing_run = await self._choice(request.name)
        await tell_doubts(self._client, request, lambda text: self._observer.remark("train", text))

    async def _choice(self, name: str) -> trainer_pb2.ExistingRunPolicy.ValueType:
        # A pipeline is there to be changed and run again: what an earlier run of this name left is kept aside.
        default = trainer_pb2.EXISTING_RUN_POLICY_BACKUP_AND_RESTART
        if self._existing.ask is None:
            return default
        try:
            run = await self._client.trainer.run(name)
        except LoralineApiError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return default
            raise
        return await self._existing.ask(run)

    async def _contract(self) -> trainer_pb2.ServingContract | None:
        """Return what the serving side can take, whatever base it serves now; None when no adapter will be served."""
        serve = self._spec.serve
        if serve is None or serve.merged or not serve.adapter:
            return None
        capabilities = await self._client.inference.capabilities()
        if not capabilities.HasField("base"):
            text = "no model is served yet: the adapter is held to the server's settings, and checked when it is loaded"
            self._observer.remark("train", text)
        contract = capabilities.contract
        return trainer_pb2.ServingContract(
            max_lora_rank=contract.max_lora_rank,
            target_modules=contract.target_modules,
            library_versions=contract.library_versions,
        )

    async def _merge(self, _: str) -> StageOutcome:
        request = merger_pb2.MergeRequest()
        request.CopyFrom(self._spec.merge or request)
        request.name = self._spec.artifact_name()
        adapter = self._made("train")

        def finish(message: merger_pb2.MergeRequest) -> None:
            message.adapters.add(ref=adapter)

        start, inputs = self._client.merger.merge, [("adapter", adapter)]
        return await self._jobs.run("merge", "merger", start, request, inputs, merger_pb2.MergeResult, finish)

    async def _serve(self, _: str) -> StageOutcome:
        spec = self._spec.serve
        assert spec is not None  # noqa: S101 - planned only when there is one
        base = trainer_pb2.BaseModel(artifact=self._made("merge")) if spec.merged else self._base()
        adapter = self._made("train") if spec.adapter else None
        return await serving.serve(self._client, base, adapter, spec.alias, self._observer)

    async def _ask(self, _: str) -> StageOutcome:
        started = time.monotonic()
        assert self._spec.ask is not None and self._spec.serve is not None  # noqa: S101 - checked when read
        tuned = self._outcomes["serve"].detail
        who = {"base": "", "tuned": tuned} if self._spec.serve.adapter else {"answer": ""}
        self._answers = await serving.ask(self._client, self._spec.ask, who)
        count = len(self._answers) * len(who)
        return StageOutcome("ask", seconds=time.monotonic() - started, detail=f"{count} answers")


def _all(failures: BaseExceptionGroup[StageFailed]) -> list[StageFailed]:
    return [
        failure
        for entry in failures.exceptions
        for failure in (_all(entry) if isinstance(entry, BaseExceptionGroup) else [entry])
    ]


def _owed(spec: PipelineSpec) -> frozenset[str]:
    """Return the stages that owe evidence."""
    owed = {
        "train": spec.train is not None,
        "merge": spec.merge is not None,
        "serve": spec.serve is not None and spec.serve.adapter,
        "ask": spec.ask is not None,
    }
    return frozenset(stage for stage, wanted in owed.items() if wanted)
