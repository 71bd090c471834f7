"""A dry run: the pipeline's own code against servers that only check requests, by the rules written in the protos.

What a real run would send is what is checked here, for it is the same code that makes it. Nothing leaves the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import protovalidate
from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.inference.v1 import inference_pb2
from loraline.api.job.v1 import job_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.aio import AsyncLoraline
from loraline.client.calls import Endpoint, Endpoints
from loraline.client.connection import STAGES, Connection
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.report import StageOutcome
from loraline.client.pipeline.run import PipelineRun
from loraline.client.pipeline.spec import PipelineSpec

_DIGEST = "sha256:" + "0" * 64
_MADE: dict[type[Message], tuple[int, type[Message]]] = {
    datagen_pb2.ConvertDatasetRequest: (artifact_pb2.ARTIFACT_KIND_DATASET, datagen_pb2.DatasetResult),
    datagen_pb2.GenerateDatasetRequest: (artifact_pb2.ARTIFACT_KIND_DATASET, datagen_pb2.DatasetResult),
    trainer_pb2.CreateTinyModelRequest: (artifact_pb2.ARTIFACT_KIND_MODEL, trainer_pb2.ModelResult),
    trainer_pb2.TrainRequest: (artifact_pb2.ARTIFACT_KIND_ADAPTER, trainer_pb2.TrainResult),
    merger_pb2.MergeRequest: (artifact_pb2.ARTIFACT_KIND_MODEL, merger_pb2.MergeResult),
}
"""Request that starts a job -> kind of the artifact and type of the result that the job would end with."""
_stage: ContextVar[str] = ContextVar("rehearsed_stage", default="")


async def rehearse(spec: PipelineSpec) -> int:
    """Check every request that a run of this file would send; return how many there are.

    INVALID_ARGUMENT INVALID_REQUEST names stage and field of each that a server would refuse.
    """
    channel = _Channel()
    async with AsyncLoraline(_Endpoints(channel)) as client:
        await PipelineRun(client, spec, _Silent()).run()
    if channel.problems:
        count = "1 field" if len(channel.problems) == 1 else f"{len(channel.problems)} fields"
        message = f"A server would refuse {count} of what {spec.file.name} asks for."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", message, channel.problems)
    return channel.requests


class _Silent:
    """The observer of a rehearsal: it remembers which stage sends what follows."""

    def started(self, stage: str, what: str) -> None:
        _stage.set(stage)

    def sent(self, stage: str, done: int, total: int) -> None: ...

    def job_update(self, stage: str, update: job_pb2.WatchJobResponse) -> None: ...

    def remark(self, stage: str, text: str) -> None: ...

    def finished(self, outcome: StageOutcome) -> None: ...


class _Endpoints(Endpoints):
    """Every stage at one address that is nowhere."""

    def __init__(self, channel: Any):
        super().__init__(Connection(dict.fromkeys(STAGES, "rehearsal")))
        self._by_address["rehearsal"] = Endpoint("rehearsal", channel)


class _Channel:
    """What stubs need of a channel. Each reply is empty but for what a pipeline reads of it."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.requests = 0

    def unary_unary(self, method: str, *_: Any, response_deserializer: Any, **__: Any) -> Callable[..., Any]:
        async def call(request: Message, **_: Any) -> Message:
            self._check(request)
            return _filled(response_deserializer(b""), request)

        return call

    def unary_stream(self, method: str, *_: Any, response_deserializer: Any, **__: Any) -> Callable[..., Any]:
        def call(request: Message, **_: Any) -> _Stream:
            self._check(request)
            return _Stream(response_deserializer(b""))

        return call

    def stream_unary(self, method: str, *_: Any, response_deserializer: Any, **__: Any) -> Callable[..., Any]:
        async def call(requests: AsyncIterator[Message], **_: Any) -> Message:
            first = await anext(requests)  # the header; the files are not read
            self._check(first)
            return _filled(response_deserializer(b""), first)

        return call

    async def close(self, _: object) -> None: ...

    def _check(self, request: Message) -> None:
        if isinstance(request, trainer_pb2.PlanRunRequest):
            return  # the same run is checked when it is started
        self.requests += 1
        for violation in protovalidate.collect_violations(request):
            where = f"{_stage.get()}: {_path(violation)}".rstrip(": ")
            self.problems.setdefault(where, violation.proto.message or "is not valid")


class _Stream:
    def __init__(self, reply: Message):
        self._replies = [reply]

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Message:
        if not self._replies:
            raise StopAsyncIteration
        return self._replies.pop()

    def cancel(self) -> None: ...


def _path(violation: protovalidate.Violation) -> str:
    elements = violation.proto.field.elements if violation.proto.field else ()
    subscripts = (f"[{e.subscript.value!r}]" if e.subscript is not None else "" for e in elements)
    return ".".join(e.field_name + subscript for e, subscript in zip(elements, subscripts, strict=True))


def _filled(reply: Any, request: Any) -> Message:
    """Put into a reply what the next stage needs: the artifact asked for or made, and a job that has succeeded."""
    if isinstance(request, artifact_pb2.UploadArtifactRequest):
        reply.artifact.CopyFrom(_artifact(request.header.kind, request.header.name))
    elif isinstance(request, artifact_pb2.GetArtifactRequest):
        reply.artifact.CopyFrom(_artifact(request.ref.kind, request.ref.name))
    elif type(request) in _MADE:
        kind, result = _MADE[type(request)]
        reply.job.name, reply.job.state = "rehearsal", job_pb2.JOB_STATE_SUCCEEDED
        reply.job.outputs.append(_artifact(kind, request.name or "unnamed").ref)
        reply.job.result.Pack(result())
    elif isinstance(request, inference_pb2.SetAliasRequest):
        reply.model.name = request.adapter.name
    return reply


def _artifact(kind: Any, name: str) -> artifact_pb2.Artifact:
    ref = artifact_pb2.ArtifactRef(kind=kind, name=name, version=1, digest=_DIGEST)
    return artifact_pb2.Artifact(ref=ref, digest=_DIGEST)
