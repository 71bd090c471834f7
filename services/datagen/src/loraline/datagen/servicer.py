"""Proto to domain, validate, enqueue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2, datagen_pb2_grpc
from loraline.api.job.v1 import job_pb2
from loraline.core.errors import LoralineError, invalid_argument
from loraline.core.jobs.handlers import JobHandler
from loraline.core.server_paths import allowed_path
from loraline.core.serving.component import Platform
from loraline.datagen.config import DatagenSettings
from loraline.datagen.convert.files import find_files
from loraline.datagen.llms.endpoint import endpoints_of, from_environment, probe
from loraline.datagen.llms.recipes import RECIPES
from loraline.datagen.llms.texts import TEXT_FILES
from loraline.datagen.metrics import DatagenMetrics
from loraline.datagen.preview import preview
from loraline.datagen.publish.split import DEFAULT_FRACTION
from loraline.datagen.quality.request import gate_of, resolve_base_model
from loraline.datagen.sources import Location, located
from loraline.datagen.spec import check_source, named_sources

CONVERT = JobHandler("datagen.convert", datagen_pb2.ConvertDatasetRequest, "loraline.datagen.job:convert_dataset")
GENERATE = JobHandler("datagen.generate", datagen_pb2.GenerateDatasetRequest, "loraline.datagen.job:generate_dataset")
CHECK = JobHandler("datagen.check", datagen_pb2.CheckDatasetRequest, "loraline.datagen.quality.job:check_dataset")
_JSON = datagen_pb2.OUTPUT_FORMAT_JSON
HANDLERS = (CONVERT, GENERATE, CHECK)

DatasetRequest = TypeVar(
    "DatasetRequest", datagen_pb2.ConvertDatasetRequest, datagen_pb2.GenerateDatasetRequest
)  # fmt: skip
Context = grpc.aio.ServicerContext


class DatagenServicer(datagen_pb2_grpc.DatagenServiceServicer):
    """The DatagenService of the contract."""

    def __init__(self, platform: Platform, settings: DatagenSettings):
        self._platform, self._settings = platform, settings
        self._metrics = DatagenMetrics(platform.registry)

    async def ConvertDataset(
        self, request: datagen_pb2.ConvertDatasetRequest, context: Context
    ) -> datagen_pb2.ConvertDatasetResponse:
        """Start converting raw files."""
        source = datagen_pb2.DatasetSource(convert=request.source)
        job = await self._submit(CONVERT, request, [("source", source)])
        return datagen_pb2.ConvertDatasetResponse(job=job)

    async def GenerateDataset(
        self, request: datagen_pb2.GenerateDatasetRequest, context: Context
    ) -> datagen_pb2.GenerateDatasetResponse:
        """Start making a dataset from sources."""
        named_sources(request.sources)
        sources = [(f"sources[{index}]", source) for index, source in enumerate(request.sources)]
        job = await self._submit(GENERATE, request, sources)
        return datagen_pb2.GenerateDatasetResponse(job=job)

    async def _submit(
        self, handler: JobHandler, request: DatasetRequest, sources: Sequence[tuple[str, datagen_pb2.DatasetSource]]
    ) -> job_pb2.Job:
        gate_of(request.gate)
        for field, source in sources:
            await self._check(source, field)
        spec = type(request)()
        spec.CopyFrom(request)
        if not spec.split.HasField("validation_fraction"):
            spec.split.validation_fraction = DEFAULT_FRACTION
        inputs = await self._resolve_sources(spec)
        inputs += await self._resolve_gate(spec.gate)
        return await self._platform.jobs.submit(handler, spec, inputs=inputs, labels=_labels(request.labels))

    async def _check(self, source: datagen_pb2.DatasetSource, field: str) -> None:
        """Refuse at once what would fail in the job: paths, kinds, recipes, endpoints that are not configured."""
        check_source(source, field)
        if source.WhichOneof("source") == "llm":
            endpoints_of(source.llm)
        if source.convert.WhichOneof("location") == "path":
            path = allowed_path(source.convert.path, self._platform.settings.allowed_paths, f"{field}.path")
            await asyncio.to_thread(find_files, path, source.convert.subpath)
        texts = source.llm.texts
        if texts.path:
            path = allowed_path(texts.path, self._platform.settings.allowed_paths, f"{field}.llm.texts.path")
            await asyncio.to_thread(find_files, path, texts.subpath, types=TEXT_FILES)

    async def _resolve_sources(
        self, spec: datagen_pb2.ConvertDatasetRequest | datagen_pb2.GenerateDatasetRequest
    ) -> list[artifact_pb2.ArtifactRef]:
        """Make the references in the spec exact, so that the job reads what was there when the call was accepted."""
        if isinstance(spec, datagen_pb2.ConvertDatasetRequest):
            by_artifact = spec.source.WhichOneof("location") == "artifact"
            places: list[Location] = [spec.source] if by_artifact else []
        else:
            places = located(spec.sources)
        inputs: list[artifact_pb2.ArtifactRef] = []
        for place in places:
            place.artifact.CopyFrom(await self._resolve(place.artifact))
            inputs.append(place.artifact)
        return inputs

    async def _resolve_gate(self, gate: datagen_pb2.QualityGate) -> list[artifact_pb2.ArtifactRef]:
        await asyncio.to_thread(resolve_base_model, gate, self._platform.library)
        return [gate.base_model] if gate.HasField("base_model") else []

    async def _resolve(self, ref: artifact_pb2.ArtifactRef) -> artifact_pb2.ArtifactRef:
        return await asyncio.to_thread(self._platform.library.resolve, ref)

    async def PreviewDataset(
        self, request: datagen_pb2.PreviewDatasetRequest, context: Context
    ) -> datagen_pb2.PreviewDatasetResponse:
        """Make first rows at once."""
        await self._check(request.source, "source")
        rows = await asyncio.to_thread(
            preview, request.source, request.rows, request.seed, self._platform.settings.allowed_paths,
            self._platform.library.fetch,
        )  # fmt: skip
        self._metrics.preview_rows.labels(request.source.WhichOneof("source") or "").inc(len(rows))
        return datagen_pb2.PreviewDatasetResponse(rows=[_struct(json.loads(row.to_line())) for row in rows])

    async def CheckDataset(
        self, request: datagen_pb2.CheckDatasetRequest, context: Context
    ) -> datagen_pb2.CheckDatasetResponse:
        """Start a quality check."""
        gate_of(request.gate)
        if request.dataset.kind != artifact_pb2.ARTIFACT_KIND_DATASET:
            raise invalid_argument(
                "ARTIFACT_KIND_WRONG", "Only datasets can be checked.", dataset__kind="must be ARTIFACT_KIND_DATASET"
            )
        spec = datagen_pb2.CheckDatasetRequest()
        spec.CopyFrom(request)
        spec.dataset.CopyFrom(await self._resolve(request.dataset))
        inputs = [spec.dataset, *await self._resolve_gate(spec.gate)]
        job = await self._platform.jobs.submit(CHECK, spec, inputs=inputs)
        return datagen_pb2.CheckDatasetResponse(job=job)

    async def ProbeEndpoint(
        self, request: datagen_pb2.ProbeEndpointRequest, context: Context
    ) -> datagen_pb2.ProbeEndpointResponse:
        """Ask an endpoint for its models."""
        try:
            endpoint = from_environment(request.endpoint.name, request.endpoint.model)
            models, seconds = await probe(endpoint, self._settings.probe_timeout_seconds)
        except LoralineError as error:
            self._metrics.probes.labels(error.reason).inc()
            raise
        self._metrics.probes.labels("ok").inc()
        latency, now = Duration(), Timestamp()
        latency.FromTimedelta(timedelta(seconds=seconds))
        now.GetCurrentTime()
        return datagen_pb2.ProbeEndpointResponse(models=models, latency=latency, time=now)

    async def ListRecipes(
        self, request: datagen_pb2.ListRecipesRequest, context: Context
    ) -> datagen_pb2.ListRecipesResponse:
        """List the built-in recipes by name."""
        names = sorted(name for name in RECIPES if name > request.page_token)
        page = names[: request.page_size or 50]
        recipes = [
            datagen_pb2.Recipe(
                name=name, description=RECIPES[name].description, item_schema=_struct(RECIPES[name].item_schema),
                system_prompt=RECIPES[name].system_prompt, requires=RECIPES[name].requires,
                profits_from=RECIPES[name].profits_from,
                answer_format=_JSON if RECIPES[name].format == "json" else datagen_pb2.OUTPUT_FORMAT_UNSPECIFIED,
            )
            for name in page
        ]  # fmt: skip
        return datagen_pb2.ListRecipesResponse(recipes=recipes, next_page_token=page[-1] if page != names else "")


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    return dict(labels)


def _struct(value: Mapping[str, Any]) -> Struct:
    struct = Struct()
    struct.update(value)
    return struct
