"""One job per stage and content: found again, attached to, resumed, or started."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.client.aio import AsyncLoraline
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.identity import request_id
from loraline.client.pipeline.report import Observer, StageOutcome
from loraline.client.resources.jobs import job_failure, job_result

Inputs = Iterable[tuple[str, artifact_pb2.ArtifactRef]]
Start = Callable[[Any], Awaitable[job_pb2.Job]]

_RESUMABLE = (job_pb2.JOB_STATE_PAUSED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


class StageJobs:
    """Runs the stages that are jobs, on one pipeline's behalf. `live` names the jobs that this run waits for."""

    def __init__(self, client: AsyncLoraline, pipeline: str, observer: Observer):
        self._client = client
        self._pipeline = pipeline
        self._observer = observer
        self.live: dict[str, str] = {}

    async def run(
        self,
        stage: str,
        server: str,
        start: Start,
        request: Message,
        inputs: Inputs,
        result_type: type[Any],
        finish: Callable[[Any], None] | None = None,
        decide: Callable[[Any], Awaitable[None]] | None = None,
    ) -> StageOutcome:
        """Bring a stage's job to its end and return what it made.

        `request` holds the settings of the file; `inputs` are (role, exact reference); `finish` puts into the request
        what shall not change its identity: the references by version, and the serving contract. `decide` does the same
        for what has to be asked first, only when a new job is about to start. A job that does not succeed raises
        JobNotSuccessful.
        """
        identity = request_id(self._pipeline, stage.replace(":", "."), request, inputs)
        found, broken = await self._find(server, identity)
        how = ""
        if found is None:
            request.request_id = identity if not broken else f"{identity}.{broken + 1}"  # type: ignore[attr-defined]
            if "labels" in request.DESCRIPTOR.fields_by_name:
                request.labels.update(pipeline=self._pipeline, stage=stage.replace(":", "."))  # type: ignore[attr-defined]
            if finish is not None:
                finish(request)
            if decide is not None:
                await decide(request)
            job, after = await self._start(stage, start, request), 0
            self._observer.remark(stage, f"job {job.name}")
        else:
            job, how = await self._take_up(stage, found)
            after = found.last_sequence
        if job.state != job_pb2.JOB_STATE_SUCCEEDED:
            job = await self._follow(stage, job, after)
        result = job_result(job, result_type)
        seconds = 0.0 if how == "already done" else _seconds(job)
        outcome = StageOutcome(stage, how, job.name, seconds=seconds, result=result)
        if job.outputs:
            outcome.artifact = await self._client.artifacts.show(job.outputs[0])
        return outcome

    async def _start(self, stage: str, start: Start, request: Message) -> job_pb2.Job:
        """Start a job. A run that ends meanwhile waits for its name: nobody shall be left with a job unheard of."""
        starting = asyncio.ensure_future(start(request))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with contextlib.suppress(LoralineApiError):
                self.live[stage] = (await starting).name
            raise

    async def _find(self, server: str, identity: str) -> tuple[job_pb2.Job | None, int]:
        """Return the newest usable job of this identity, and how many succeeded ones have lost their artifacts."""
        broken = 0
        for job in await self._client.jobs.list(kind_prefix=f"{server}."):
            if job.request_id != identity and not job.request_id.startswith(f"{identity}."):
                continue
            if job.state != job_pb2.JOB_STATE_SUCCEEDED or await self._outputs_exist(job):
                return job, broken
            broken += 1
        return None, broken

    async def _outputs_exist(self, job: job_pb2.Job) -> bool:
        try:
            await asyncio.gather(*(self._client.artifacts.show(ref) for ref in job.outputs))
        except LoralineApiError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    async def _take_up(self, stage: str, job: job_pb2.Job) -> tuple[job_pb2.Job, str]:
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            return job, "already done"
        state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
        if job.state in _RESUMABLE:
            self._observer.remark(stage, f"{job.name} was {state}; resuming it from its last state")
            return await self._client.jobs.resume(job.name), f"resumed after {state}"
        self._observer.remark(stage, f"{job.name} is {state} already; attached to it")
        return job, "attached"

    async def _follow(self, stage: str, job: job_pb2.Job, after: int) -> job_pb2.Job:
        self.live[stage] = job.name
        ended = await self._client.jobs.wait(
            job.name, on_update=lambda update: self._observer.job_update(stage, update), after_sequence=after
        )
        self.live.pop(stage, None)
        if ended.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise job_failure(ended)
        return ended


def _seconds(job: job_pb2.Job) -> float:
    if not (job.HasField("start_time") and job.HasField("end_time")):
        return 0.0
    return job.end_time.ToNanoseconds() / 1e9 - job.start_time.ToNanoseconds() / 1e9
