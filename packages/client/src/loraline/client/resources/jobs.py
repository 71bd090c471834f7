"""Jobs of every kind: look, follow, steer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.client.calls import Endpoint, Endpoints, Patience, may_repeat, pages
from loraline.client.errors import JobNotSuccessful, LoralineApiError, from_status

ResultT = TypeVar("ResultT", bound=Message)

ENDED = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})
"""States that a job does not leave by itself, PAUSED aside."""


class AsyncJobs:
    """`client.jobs`: every server knows the jobs of its stage; several servers on one database know all."""

    def __init__(self, endpoints: Endpoints):
        self._endpoints = endpoints

    def _of(self, name: str) -> tuple[Endpoint, job_pb2_grpc.JobServiceAsyncStub]:
        endpoint = self._endpoints.of_job(name)
        return endpoint, job_pb2_grpc.JobServiceStub(endpoint.channel)  # type: ignore[return-value]

    async def get(self, name: str) -> job_pb2.Job:
        """Return one job."""
        endpoint, stub = self._of(name)
        return (await endpoint.unary(stub.GetJob, job_pb2.GetJobRequest(name=name))).job

    async def list(
        self,
        *,
        kind_prefix: str = "",
        states: Sequence[job_pb2.JobState.ValueType] = (),
        labels: Mapping[str, str] | None = None,
        limit: int = 0,
    ) -> list[job_pb2.Job]:
        """Return jobs, newest first; `limit` 0 means all."""
        endpoint, stub = self._of(kind_prefix)

        async def page(token: str) -> job_pb2.ListJobsResponse:
            request = job_pb2.ListJobsRequest(
                kind_prefix=kind_prefix,
                states=states,
                labels=labels or {},
                page_size=min(limit or 200, 500),
                page_token=token,
            )
            return await endpoint.unary(stub.ListJobs, request)

        jobs: list[job_pb2.Job] = []
        async for job in pages(page, lambda reply: reply.jobs):
            jobs.append(job)
            if limit and len(jobs) >= limit:
                break
        return jobs

    async def watch(self, name: str, after_sequence: int = 0) -> AsyncIterator[job_pb2.WatchJobResponse]:
        """Yield a job's events, each once and in order, until the job has ended.

        A stream that breaks is taken up again after the last event seen, so that nothing is missed while a server
        restarts; the failure is raised only when no server answers for two minutes. A PAUSED job keeps the stream open.
        """
        endpoint, stub = self._of(name)
        patience: Patience | None = None
        while True:
            seen = after_sequence
            request = job_pb2.WatchJobRequest(name=name, after_sequence=after_sequence)
            try:
                async for update in endpoint.stream(stub.WatchJob, request):
                    if update.event.sequence > after_sequence:
                        after_sequence = update.event.sequence
                        yield update
                job = await self.get(name)
                if job.state in ENDED and job.last_sequence <= after_sequence:
                    return
                lost = _ended_early(endpoint)
            except LoralineApiError as error:
                if not _stream_was_cut(error):
                    raise
                lost = error
            if patience is None or after_sequence > seen:
                patience = endpoint.patience()
            await patience.wait_or_raise(lost)

    async def wait(
        self,
        name: str,
        *,
        on_update: Callable[[job_pb2.WatchJobResponse], None] | None = None,
        after_sequence: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109 - part of the public face
    ) -> job_pb2.Job:
        """Return the job once it has ended or is PAUSED, whatever the outcome; see `result` for a raising form.

        `on_update` is called with every event after `after_sequence`. `timeout` is in seconds; past it TimeoutError is
        raised and the job goes on.
        """
        async with asyncio.timeout(timeout):
            job = await self.get(name)
            after = after_sequence if on_update else job.last_sequence
            if _stands(job) and job.last_sequence <= after:
                return job
            async for update in self.watch(name, after):
                if on_update:
                    on_update(update)
                # The job may have ended while older events are still on their way: the newest one ends the wait.
                if _stands(update.job) and update.event.sequence >= update.job.last_sequence:
                    break
            return await self.get(name)

    async def result(self, name: str, result_type: type[ResultT]) -> ResultT:
        """Wait for a job and return its typed result; raise JobNotSuccessful when it did not succeed."""
        return job_result(await self.wait(name), result_type)

    async def cancel(self, name: str) -> job_pb2.Job:
        """Ask a job to stop for good; it may run on for a moment."""
        endpoint, stub = self._of(name)
        return (await endpoint.unary(stub.CancelJob, job_pb2.CancelJobRequest(name=name))).job

    async def pause(self, name: str) -> job_pb2.Job:
        """Ask a job to stop with its progress kept."""
        endpoint, stub = self._of(name)
        return (await endpoint.unary(stub.PauseJob, job_pb2.PauseJobRequest(name=name))).job

    async def resume(self, name: str) -> job_pb2.Job:
        """Let a PAUSED, FAILED or CANCELLED job go on from its last state."""
        endpoint, stub = self._of(name)
        return (await endpoint.unary(stub.ResumeJob, job_pb2.ResumeJobRequest(name=name), idempotent=False)).job

    async def delete(self, name: str) -> None:
        """Delete an ended job's record; its artifacts stay."""
        endpoint, stub = self._of(name)
        await endpoint.unary(stub.DeleteJob, job_pb2.DeleteJobRequest(name=name), idempotent=False)


def job_result(job: job_pb2.Job, result_type: type[ResultT]) -> ResultT:
    """Return a succeeded job's typed result; raise JobNotSuccessful with the job's own error otherwise."""
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        result = result_type()
        if not job.result.Unpack(result):
            raise ValueError(f"{job.name} has a result of type {job.result.type_url!r}, not {result_type.__name__}")
        return result
    raise job_failure(job)


def job_failure(job: job_pb2.Job) -> JobNotSuccessful:
    """Return the exception that tells why a job did not succeed."""
    if job.state == job_pb2.JOB_STATE_FAILED:
        cause = from_status(job.error) if job.HasField("error") else from_status(status_pb2.Status(code=2))
    elif job.state == job_pb2.JOB_STATE_PAUSED:
        cause = LoralineApiError(
            grpc.StatusCode.FAILED_PRECONDITION,
            job.pause.reason or "PAUSED",
            f"{job.name} is paused: {job.pause.message}",
        )
    else:
        word = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
        cause = LoralineApiError(grpc.StatusCode.CANCELLED, word, f"{job.name} is {word}.")
    failure = JobNotSuccessful(
        cause.code, cause.reason, cause.message, cause.fields, cause.help, cause.metadata, cause.retry_after
    )
    failure.metadata.setdefault("job", job.name)
    failure.job = job
    return failure


def _stands(job: job_pb2.Job) -> bool:
    return job.state in ENDED or job.state == job_pb2.JOB_STATE_PAUSED


def _stream_was_cut(error: LoralineApiError) -> bool:
    """Whether a stream ended because of the way, not because of the question."""
    if may_repeat(error) or error.code is grpc.StatusCode.CANCELLED:
        return True
    return error.code is grpc.StatusCode.INTERNAL and "RST_STREAM" in error.message


def _ended_early(endpoint: Endpoint) -> LoralineApiError:
    message = f"The server at {endpoint.address} keeps ending the event stream of a job that has not ended."
    return LoralineApiError(grpc.StatusCode.UNAVAILABLE, "STREAM_ENDED_EARLY", message, address=endpoint.address)
