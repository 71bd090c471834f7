"""Datagen, trainer and merger: start jobs. Each start returns the job; `client.jobs` follows it.

A request without a request_id gets a random one, so that a start which is repeated because a connection broke never
makes a second job.
"""

from __future__ import annotations

import uuid
from typing import Any

from loraline.api.datagen.v1 import datagen_pb2, datagen_pb2_grpc
from loraline.api.job.v1 import job_pb2
from loraline.api.merger.v1 import merger_pb2, merger_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
from loraline.client.calls import WORK_SECONDS, Endpoint, Endpoints, pages


class AsyncDatagen:
    """`client.datagen`: raw text in, datasets out."""

    def __init__(self, endpoints: Endpoints):
        self._endpoint = endpoints.of("datagen")
        self._stub: datagen_pb2_grpc.DatagenServiceAsyncStub = datagen_pb2_grpc.DatagenServiceStub(
            self._endpoint.channel
        )  # type: ignore[assignment]

    async def convert(self, request: datagen_pb2.ConvertDatasetRequest) -> job_pb2.Job:
        """Start converting raw files; the job's result is a DatasetResult."""
        return await _start(self._endpoint, self._stub.ConvertDataset, request)

    async def generate(self, request: datagen_pb2.GenerateDatasetRequest) -> job_pb2.Job:
        """Start making a dataset from files, templates or language models; the result is a DatasetResult."""
        return await _start(self._endpoint, self._stub.GenerateDataset, request)

    async def check(self, request: datagen_pb2.CheckDatasetRequest) -> job_pb2.Job:
        """Start a quality check; the result is a CheckResult."""
        return await _start(self._endpoint, self._stub.CheckDataset, request)

    async def preview(self, request: datagen_pb2.PreviewDatasetRequest) -> datagen_pb2.PreviewDatasetResponse:
        """Return the first rows of a source at once, without publishing anything."""
        return await self._endpoint.unary(self._stub.PreviewDataset, request, timeout=WORK_SECONDS)

    async def probe_endpoint(self, name: str = "", model: str = "") -> datagen_pb2.ProbeEndpointResponse:
        """Ask whether a language-model endpoint answers and has the model; an error says what is wrong."""
        endpoint = datagen_pb2.LlmEndpoint(name=name, model=model)
        request = datagen_pb2.ProbeEndpointRequest(endpoint=endpoint)
        return await self._endpoint.unary(self._stub.ProbeEndpoint, request, timeout=WORK_SECONDS)

    async def recipes(self) -> list[datagen_pb2.Recipe]:
        """Return the built-in recipes."""

        async def page(token: str) -> datagen_pb2.ListRecipesResponse:
            return await self._endpoint.unary(self._stub.ListRecipes, datagen_pb2.ListRecipesRequest(page_token=token))

        return [recipe async for recipe in pages(page, lambda reply: reply.recipes)]


class AsyncTrainer:
    """`client.trainer`: datasets in, adapters out."""

    def __init__(self, endpoints: Endpoints):
        self._endpoint = endpoints.of("trainer")
        self._stub: trainer_pb2_grpc.TrainerServiceAsyncStub = trainer_pb2_grpc.TrainerServiceStub(
            self._endpoint.channel
        )  # type: ignore[assignment]

    async def train(self, request: trainer_pb2.TrainRequest) -> job_pb2.Job:
        """Start a training run; the job's result is a TrainResult."""
        return await _start(self._endpoint, self._stub.Train, request)

    async def plan(self, run: trainer_pb2.TrainRequest) -> trainer_pb2.PlanRunResponse:
        """Check a run without starting it."""
        request = trainer_pb2.PlanRunRequest(run=run)
        return await self._endpoint.unary(self._stub.PlanRun, request, timeout=WORK_SECONDS)

    async def diagnose(self, run: str) -> trainer_pb2.DiagnoseResponse:
        """Judge a run from its log history."""
        request = trainer_pb2.DiagnoseRequest(run=run)
        return await self._endpoint.unary(self._stub.Diagnose, request)

    async def diagnose_file(self, trainer_state_json: bytes) -> trainer_pb2.DiagnoseResponse:
        """Judge a run from the content of a trainer_state.json, whoever trained it."""
        request = trainer_pb2.DiagnoseRequest(trainer_state_json=trainer_state_json)
        return await self._endpoint.unary(self._stub.Diagnose, request, timeout=WORK_SECONDS)

    async def run(self, name: str) -> trainer_pb2.Run:
        """Return one run with its checkpoints."""
        return (await self._endpoint.unary(self._stub.GetRun, trainer_pb2.GetRunRequest(name=name))).run

    async def runs(self) -> list[trainer_pb2.Run]:
        """Return all runs, newest first."""

        async def page(token: str) -> trainer_pb2.ListRunsResponse:
            return await self._endpoint.unary(self._stub.ListRuns, trainer_pb2.ListRunsRequest(page_token=token))

        return [run async for run in pages(page, lambda reply: reply.runs)]

    async def import_model(self, request: trainer_pb2.ImportModelRequest) -> job_pb2.Job:
        """Start bringing a base model into the store; the result is a ModelResult."""
        return await _start(self._endpoint, self._stub.ImportModel, request)

    async def create_tiny_model(self, request: trainer_pb2.CreateTinyModelRequest) -> job_pb2.Job:
        """Start making a toy base model; the result is a ModelResult."""
        return await _start(self._endpoint, self._stub.CreateTinyModel, request)


class AsyncMerger:
    """`client.merger`: adapters in, measured models out."""

    def __init__(self, endpoints: Endpoints):
        self._endpoint = endpoints.of("merger")
        self._stub: merger_pb2_grpc.MergerServiceAsyncStub = merger_pb2_grpc.MergerServiceStub(self._endpoint.channel)  # type: ignore[assignment]

    async def merge(self, request: merger_pb2.MergeRequest) -> job_pb2.Job:
        """Start a merge; the job's result is a MergeResult."""
        return await _start(self._endpoint, self._stub.Merge, request)

    async def check(self, request: merger_pb2.CheckModelRequest) -> job_pb2.Job:
        """Start checking a model folder; the result is a CheckModelResult."""
        return await _start(self._endpoint, self._stub.CheckModel, request)

    async def repair(self, request: merger_pb2.RepairModelRequest) -> job_pb2.Job:
        """Start repairing a model folder into a new version; the result is a RepairModelResult."""
        return await _start(self._endpoint, self._stub.RepairModel, request)

    async def export(self, request: merger_pb2.ExportModelRequest) -> job_pb2.Job:
        """Start an export for another runtime; the result is an ExportModelResult."""
        return await _start(self._endpoint, self._stub.ExportModel, request)


async def _start(endpoint: Endpoint, method: Any, request: Any) -> job_pb2.Job:
    if not request.request_id:
        copy = type(request)()
        copy.CopyFrom(request)
        copy.request_id = str(uuid.uuid4())
        request = copy
    return (await endpoint.unary(method, request)).job
