"""The gRPC face of jobs: JobService of every server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.core.jobs.queue import JobQueue


class JobService(job_pb2_grpc.JobServiceServicer):
    """Hands each call to the queue; errors are LoralineErrors, which the server's interceptor maps to statuses."""

    def __init__(self, queue: JobQueue):
        self._queue = queue

    async def GetJob(self, request: job_pb2.GetJobRequest, context: Any) -> job_pb2.GetJobResponse:
        """Return one job."""
        return job_pb2.GetJobResponse(job=await self._queue.get(request.name))

    async def ListJobs(self, request: job_pb2.ListJobsRequest, context: Any) -> job_pb2.ListJobsResponse:
        """Return a page of jobs."""
        jobs, token = await self._queue.list(
            kind_prefix=request.kind_prefix,
            states=request.states,
            labels=dict(request.labels),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return job_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: Any) -> AsyncIterator[job_pb2.WatchJobResponse]:
        """Stream events until the job has ended."""
        async for event, job in self._queue.watch(request.name, request.after_sequence):
            yield job_pb2.WatchJobResponse(event=event, job=job)

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: Any) -> job_pb2.CancelJobResponse:
        """Ask a job to stop for good."""
        return job_pb2.CancelJobResponse(job=await self._queue.cancel(request.name))

    async def PauseJob(self, request: job_pb2.PauseJobRequest, context: Any) -> job_pb2.PauseJobResponse:
        """Ask a job to stop with its progress kept."""
        return job_pb2.PauseJobResponse(job=await self._queue.pause(request.name))

    async def ResumeJob(self, request: job_pb2.ResumeJobRequest, context: Any) -> job_pb2.ResumeJobResponse:
        """Let a job go on."""
        return job_pb2.ResumeJobResponse(job=await self._queue.resume(request.name))

    async def DeleteJob(self, request: job_pb2.DeleteJobRequest, context: Any) -> job_pb2.DeleteJobResponse:
        """Delete an ended job."""
        await self._queue.delete(request.name)
        return job_pb2.DeleteJobResponse()
