"""TrainerService: proto <-> domain, validation, queueing. No torch here."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import grpc.aio

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.api.trainer.v1 import trainer_pb2_grpc
from loraline.core.errors import invalid_argument, not_found
from loraline.core.jobs.handlers import JobHandler
from loraline.core.server_paths import model_folder
from loraline.core.serving.component import Platform
from loraline.trainer import hub_base
from loraline.trainer.base_models import check_folder
from loraline.trainer.config import TrainerSettings
from loraline.trainer.continuing import RUN_LABEL
from loraline.trainer.diagnosis.larger_base import models_in
from loraline.trainer.diagnosis.subject import diagnose, from_file, from_jobs
from loraline.trainer.init_adapter import with_start
from loraline.trainer.planning import plan
from loraline.trainer.published import published_checkpoints
from loraline.trainer.runs import first_batch, refuse_existing, run_of
from loraline.trainer.spec import not_servable, resolve, servability_problems, training_spec

TRAIN = JobHandler("trainer.train", pb.TrainRequest, "loraline.trainer.job:train")
IMPORT_MODEL = JobHandler("trainer.import_model", pb.ImportModelRequest, "loraline.trainer.job:import_model")
CREATE_TINY_MODEL = JobHandler(
    "trainer.create_tiny_model", pb.CreateTinyModelRequest, "loraline.trainer.job:create_tiny_model"
)
_TEXTS = (artifact_pb2.ARTIFACT_KIND_SOURCE, artifact_pb2.ARTIFACT_KIND_DATASET)


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Accepts runs and answers questions about them."""

    def __init__(self, platform: Platform, settings: TrainerSettings):
        self._platform, self._settings = platform, settings
        # Two requests for one name must not both find it free.
        self._submitting = asyncio.Lock()

    async def Train(self, request: pb.TrainRequest, context: grpc.aio.ServicerContext) -> pb.TrainResponse:
        """Check a run and queue it."""
        request = await asyncio.to_thread(with_start, request, self._platform.library)
        training_spec(request)
        problems = servability_problems(request)
        if problems:
            raise not_servable(problems)
        filled = await self._with_exact_inputs(resolve(request))
        inputs = [dataset.ref for dataset in filled.datasets]
        if filled.base_model.HasField("artifact"):
            inputs.append(filled.base_model.artifact)
        if filled.HasField("init_adapter"):
            inputs.append(filled.init_adapter)
        labels = {**filled.labels, RUN_LABEL: filled.name}
        async with self._submitting:
            jobs = await self._jobs_of(filled.name)
            refusal = await asyncio.to_thread(
                refuse_existing, filled, jobs, self._platform.settings.data_dir, lambda: self._stored(filled.name, jobs)
            )
            if refusal is not None:
                raise refusal
            job = await self._platform.jobs.submit(TRAIN, filled, inputs=inputs, labels=labels)
        return pb.TrainResponse(job=job)

    async def PlanRun(self, request: pb.PlanRunRequest, context: grpc.aio.ServicerContext) -> pb.PlanRunResponse:
        """Check a run without starting it."""
        jobs = await self._jobs_of(request.run.name)
        return await asyncio.to_thread(plan, request.run, self._platform, self._settings, jobs)

    async def Diagnose(self, request: pb.DiagnoseRequest, context: grpc.aio.ServicerContext) -> pb.DiagnoseResponse:
        """Judge a run, or a trainer_state.json, by its loss curve."""
        if request.WhichOneof("subject") == "trainer_state_json":
            subject = await asyncio.to_thread(from_file, request.trainer_state_json)
        else:
            jobs = await self._existing_jobs(request.run)
            subject = await asyncio.to_thread(from_jobs, request.run, jobs, self._platform.settings.data_dir)
        models = await asyncio.to_thread(models_in, self._platform.library)
        return await asyncio.to_thread(diagnose, subject, models)

    async def GetRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.GetRunResponse:
        """Return one run."""
        jobs = await self._existing_jobs(request.name)
        run = await asyncio.to_thread(self._run, request.name, jobs)
        run.first_batch.extend(await asyncio.to_thread(first_batch, jobs[0], self._platform.settings.data_dir))
        return pb.GetRunResponse(run=run)

    async def ListRuns(self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext) -> pb.ListRunsResponse:
        """Return a page of runs; a page is cut from the jobs, so a run shows up with its newest job."""
        jobs, token = await self._platform.jobs.list(
            kind_prefix=TRAIN.kind, page_size=request.page_size or 50, page_token=request.page_token
        )
        by_name: dict[str, list[job_pb2.Job]] = defaultdict(list)
        for job in jobs:
            by_name[job.labels.get(RUN_LABEL, "")].append(job)
        runs = []
        for name, found in by_name.items():
            everything = await self._jobs_of(name)
            # An older page repeats no run that a newer one showed.
            if everything and everything[0].name == found[0].name:
                runs.append(await asyncio.to_thread(self._run, name, everything))
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    async def ImportModel(
        self, request: pb.ImportModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.ImportModelResponse:
        """Queue the import of a base model."""
        filled = pb.ImportModelRequest()
        filled.CopyFrom(request)
        filled.source.CopyFrom(await self._with_exact_base(request.source))
        inputs = [filled.source.artifact] if filled.source.HasField("artifact") else []
        job = await self._platform.jobs.submit(IMPORT_MODEL, filled, inputs=inputs)
        return pb.ImportModelResponse(job=job)

    async def CreateTinyModel(
        self, request: pb.CreateTinyModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateTinyModelResponse:
        """Queue the making of a toy base."""
        filled = pb.CreateTinyModelRequest()
        filled.CopyFrom(request)
        filled.name = filled.name or "tiny"
        if 0 < filled.vocab_size < MIN_VOCABULARY:
            text = f"must be at least {MIN_VOCABULARY}: the bytes and the special tokens"
            raise invalid_argument("VOCABULARY_TOO_SMALL", f"vocab_size {text}.", vocab_size=text)
        for position, reference in enumerate(request.tokenizer_texts):
            if reference.kind not in _TEXTS:
                text = "must be a source or a dataset"
                message = f"tokenizer_texts[{position}] {text}."
                raise invalid_argument("NOT_A_TEXT", message, tokenizer_texts=text)
            filled.tokenizer_texts[position].CopyFrom(await self._exact(reference))
        job = await self._platform.jobs.submit(CREATE_TINY_MODEL, filled, inputs=list(filled.tokenizer_texts))
        return pb.CreateTinyModelResponse(job=job)

    async def _with_exact_inputs(self, request: pb.TrainRequest) -> pb.TrainRequest:
        for position, dataset in enumerate(request.datasets):
            if dataset.ref.kind != artifact_pb2.ARTIFACT_KIND_DATASET:
                text = "must be a dataset"
                raise invalid_argument("NOT_A_DATASET", f"datasets[{position}].ref {text}.", datasets=text)
            dataset.ref.CopyFrom(await self._exact(dataset.ref))
        request.base_model.CopyFrom(await self._with_exact_base(request.base_model))
        return request

    async def _with_exact_base(self, model: pb.BaseModel) -> pb.BaseModel:
        """Resolve an artifact; check paths and Hub ids now, so that a typing error does not wait in the queue."""
        exact = pb.BaseModel()
        exact.CopyFrom(model)
        if model.HasField("artifact"):
            if model.artifact.kind != artifact_pb2.ARTIFACT_KIND_MODEL:
                raise invalid_argument("NOT_A_MODEL", "The base must be a model artifact.", base_model__artifact="kind")
            exact.artifact.CopyFrom(await self._exact(model.artifact))
        elif model.HasField("path"):
            allowed = [*self._platform.settings.allowed_paths, *self._settings.models_dirs]
            folder = await asyncio.to_thread(model_folder, model.path, allowed, "base_model.path")
            await asyncio.to_thread(check_folder, folder, model.path)
        elif model.HasField("hub_id"):
            await asyncio.to_thread(hub_base.check, model, timeout=self._settings.hub_timeout_seconds)
        return exact

    async def _exact(self, reference: artifact_pb2.ArtifactRef) -> artifact_pb2.ArtifactRef:
        return await asyncio.to_thread(self._platform.library.resolve, reference)

    def _stored(self, run: str, jobs: list[job_pb2.Job]) -> list[artifact_pb2.Artifact]:
        return published_checkpoints(self._platform.library, run, {job.name for job in jobs})

    def _run(self, name: str, jobs: list[job_pb2.Job]) -> pb.Run:
        return run_of(name, jobs, self._platform.settings.data_dir, self._stored(name, jobs))

    async def _jobs_of(self, name: str) -> list[job_pb2.Job]:
        jobs, _ = await self._platform.jobs.list(kind_prefix=TRAIN.kind, labels={RUN_LABEL: name}, page_size=500)
        return jobs

    async def _existing_jobs(self, name: str) -> list[job_pb2.Job]:
        jobs = await self._jobs_of(name)
        if not jobs:
            message = f"There is no run {name}. ListRuns, or `loraline runs list`, names those there are."
            raise not_found("RUN_MISSING", message)
        return jobs


MIN_VOCABULARY = 320
"""Smallest vocabulary of a toy base: 256 bytes, special tokens and a few merges."""
