"""The gRPC face of the merger: validates, resolves references to exact versions, queues. No torch here."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.merger.v1 import merger_pb2, merger_pb2_grpc
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.queue import JobQueue
from loraline.core.server_paths import model_folder
from loraline.merger.spec import export_spec, merge_spec, require_kind

MERGE = JobHandler("merger.merge", merger_pb2.MergeRequest, "loraline.merger.job:run")
CHECK = JobHandler("merger.check_model", merger_pb2.CheckModelRequest, "loraline.merger.model_jobs:run_check")
REPAIR = JobHandler("merger.repair_model", merger_pb2.RepairModelRequest, "loraline.merger.model_jobs:run_repair")
EXPORT = JobHandler("merger.export_model", merger_pb2.ExportModelRequest, "loraline.merger.export_job:run_export")
HANDLERS = (MERGE, CHECK, REPAIR, EXPORT)

Context = grpc.aio.ServicerContext


class MergerServicer(merger_pb2_grpc.MergerServiceServicer):
    """Queues merges, checks, repairs and exports."""

    def __init__(self, library: ArtifactLibrary, jobs: JobQueue, settings: CoreSettings):
        self._library, self._jobs, self._settings = library, jobs, settings

    async def Merge(self, request: merger_pb2.MergeRequest, context: Context) -> merger_pb2.MergeResponse:
        """Queue a merge of exact versions."""
        merge_spec(request)
        exact = merger_pb2.MergeRequest()
        exact.CopyFrom(request)
        inputs = []
        for adapter in exact.adapters:
            inputs.append(await self._pin(adapter.ref))
        if exact.HasField("base_model"):
            inputs.append(await self._pin(exact.base_model))
        job = await self._jobs.submit(MERGE, exact, inputs=inputs, labels=dict(request.labels))
        return merger_pb2.MergeResponse(job=job)

    async def CheckModel(
        self, request: merger_pb2.CheckModelRequest, context: Context
    ) -> merger_pb2.CheckModelResponse:
        """Queue a check."""
        exact = merger_pb2.CheckModelRequest()
        exact.CopyFrom(request)
        job = await self._jobs.submit(CHECK, exact, inputs=await self._pin_locations(exact))
        return merger_pb2.CheckModelResponse(job=job)

    async def RepairModel(
        self, request: merger_pb2.RepairModelRequest, context: Context
    ) -> merger_pb2.RepairModelResponse:
        """Queue a repair into a new version."""
        exact = merger_pb2.RepairModelRequest()
        exact.CopyFrom(request)
        job = await self._jobs.submit(REPAIR, exact, inputs=await self._pin_locations(exact))
        return merger_pb2.RepairModelResponse(job=job)

    async def ExportModel(
        self, request: merger_pb2.ExportModelRequest, context: Context
    ) -> merger_pb2.ExportModelResponse:
        """Queue an export of an exact version."""
        export_spec(request)
        exact = merger_pb2.ExportModelRequest()
        exact.CopyFrom(request)
        inputs = [await self._pin(exact.model)]
        job = await self._jobs.submit(EXPORT, exact, inputs=inputs, labels=dict(request.labels))
        return merger_pb2.ExportModelResponse(job=job)

    async def _pin_locations(self, request: Any) -> list[ArtifactRef]:
        """Make the request's artifacts exact and return them; paths are checked against the allowed folders."""
        inputs = []
        for field in ("model", "base_model"):
            if not request.HasField(field):
                continue
            location = getattr(request, field)
            if location.WhichOneof("location") == "artifact":
                require_kind(location.artifact, artifact_pb2.ARTIFACT_KIND_MODEL, f"{field}.artifact")
                inputs.append(await self._pin(location.artifact))
            else:
                await asyncio.to_thread(model_folder, location.path, self._settings.allowed_paths, f"{field}.path")
        return inputs

    async def _pin(self, ref: ArtifactRef) -> ArtifactRef:
        """Replace a reference by the exact one."""
        exact = await asyncio.to_thread(self._library.resolve, ref)
        ref.CopyFrom(exact)
        return exact
