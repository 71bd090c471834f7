"""JobService over a real gRPC connection, above all the event stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.api.merger.v1 import merger_pb2
from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.model import CANCELLED, PAUSED, QUEUED, RUNNING, SUCCEEDED, Claim, JobEnd
from loraline.core.jobs.queue import JobQueue
from loraline.core.jobs.service import JobService
from loraline.core.testing.jobs import COUNT, struct

MERGE = JobHandler("merger.merge", merger_pb2.MergeRequest, "nowhere:nothing")


@pytest.fixture
async def stub(queue: JobQueue) -> AsyncIterator[job_pb2_grpc.JobServiceAsyncStub]:
    server = grpc.aio.server()
    job_pb2_grpc.add_JobServiceServicer_to_server(JobService(queue), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield job_pb2_grpc.JobServiceStub(channel)
    await server.stop(None)


async def start(queue: JobQueue) -> Claim:
    await queue.submit(COUNT, struct())
    claim = await asyncio.to_thread(queue.table.claim, ["test.count"], "me", 60)
    assert claim is not None
    return claim


async def test_get_list_steer_delete(stub: job_pb2_grpc.JobServiceAsyncStub, queue: JobQueue):
    job = await queue.submit(COUNT, struct(), labels={"team": "a"})
    await queue.submit(MERGE, merger_pb2.MergeRequest())
    got = await stub.GetJob(job_pb2.GetJobRequest(name=job.name))
    assert got.job == job
    listed = await stub.ListJobs(job_pb2.ListJobsRequest(kind_prefix="test.", states=[QUEUED], labels={"team": "a"}))
    assert (list(listed.jobs), listed.next_page_token) == ([job], "")
    first = await stub.ListJobs(job_pb2.ListJobsRequest(page_size=1))
    second = await stub.ListJobs(job_pb2.ListJobsRequest(page_size=1, page_token=first.next_page_token))
    assert [page.jobs[0].kind for page in (first, second)] == ["merger.merge", "test.count"]
    paused = await stub.PauseJob(job_pb2.PauseJobRequest(name=job.name))
    resumed = await stub.ResumeJob(job_pb2.ResumeJobRequest(name=job.name))
    cancelled = await stub.CancelJob(job_pb2.CancelJobRequest(name=job.name))
    assert [answer.job.state for answer in (paused, resumed, cancelled)] == [PAUSED, QUEUED, CANCELLED]
    await stub.DeleteJob(job_pb2.DeleteJobRequest(name=job.name))
    with pytest.raises(LoralineError):
        await queue.get(job.name)


async def test_submit_checks_what_the_table_could_not_hold(queue: JobQueue):
    with pytest.raises(LoralineError) as caught:
        await queue.submit(COUNT, struct(), labels={"k": "v" * 300})
    assert "labels" in caught.value.fields
    with pytest.raises(LoralineError):
        await queue.submit(COUNT, struct(), labels={str(n): "" for n in range(65)})
    with pytest.raises(LoralineError) as caught:
        await queue.submit(MERGE, merger_pb2.MergeRequest(request_id="x" * 129))
    assert "request_id" in caught.value.fields
    with pytest.raises(TypeError):
        await queue.submit(MERGE, struct())
    assert await queue.list() == ([], "")


async def test_watch_follows_and_ends_with_the_job(stub: job_pb2_grpc.JobServiceAsyncStub, queue: JobQueue):
    claim = await start(queue)
    seen: list[job_pb2.WatchJobResponse] = []

    async def watch() -> None:
        async for answer in stub.WatchJob(job_pb2.WatchJobRequest(name=claim.name)):
            seen.append(answer)

    watching = asyncio.create_task(watch())
    for number in range(5):
        note = job_pb2.Note(message=str(number))
        await asyncio.to_thread(queue.table.note, claim.name, claim.epoch, note)
        await asyncio.sleep(0.05)
    assert not watching.done()
    end = JobEnd(SUCCEEDED)
    await asyncio.to_thread(queue.table.finish, claim.name, claim.epoch, end)
    await asyncio.wait_for(watching, 10)
    assert [answer.event.sequence for answer in seen] == list(range(1, 9))
    assert seen[-1].job.state == SUCCEEDED and seen[-1].event.state_change.to == SUCCEEDED


async def test_an_ended_job_streams_its_log_and_ends(stub: job_pb2_grpc.JobServiceAsyncStub, queue: JobQueue):
    claim = await start(queue)
    await asyncio.to_thread(queue.table.finish, claim.name, claim.epoch, JobEnd(SUCCEEDED))

    async def sequences(after: int) -> list[int]:
        stream = stub.WatchJob(job_pb2.WatchJobRequest(name=claim.name, after_sequence=after))
        return [answer.event.sequence async for answer in stream]

    assert await sequences(0) == [1, 2, 3]
    assert await sequences(2) == [3]
    assert await sequences(3) == []
    assert await sequences(99) == []


async def test_a_broken_stream_resumes_without_loss(stub: job_pb2_grpc.JobServiceAsyncStub, queue: JobQueue):
    """The client breaks off again and again while the log grows, in more than one batch."""
    claim = await start(queue)
    writing = asyncio.create_task(asyncio.to_thread(_write_many, queue, claim, 300))
    seen: list[int] = []
    breaks = 0
    while True:
        after = seen[-1] if seen else 0
        stream = stub.WatchJob(job_pb2.WatchJobRequest(name=claim.name, after_sequence=after))
        count, ended = 0, True
        async for answer in stream:
            seen.append(answer.event.sequence)
            count += 1
            if count == 70:
                stream.cancel()
                ended, breaks = False, breaks + 1
                break
        if ended:
            break
    await writing
    assert breaks >= 3
    assert seen == list(range(1, 304))


def _write_many(queue: JobQueue, claim: Claim, count: int) -> None:
    for number in range(count):
        queue.table.note(claim.name, claim.epoch, job_pb2.Note(message=str(number)))
    queue.table.finish(claim.name, claim.epoch, JobEnd(SUCCEEDED))


async def test_a_paused_job_keeps_its_stream_open(stub: job_pb2_grpc.JobServiceAsyncStub, queue: JobQueue):
    claim = await start(queue)
    stream = stub.WatchJob(job_pb2.WatchJobRequest(name=claim.name, after_sequence=2))
    await asyncio.to_thread(queue.table.finish, claim.name, claim.epoch, JobEnd(PAUSED))
    answers = aiter(stream)
    first = await asyncio.wait_for(anext(answers), 10)
    assert first.event.state_change.to == PAUSED
    waiting = asyncio.ensure_future(anext(answers))
    await asyncio.sleep(0.6)
    assert not waiting.done()
    await queue.resume(claim.name)
    assert (await asyncio.wait_for(waiting, 10)).event.state_change.to == QUEUED
    stream.cancel()


async def test_many_watchers_cost_one_query_an_interval(queue: JobQueue, monkeypatch):
    claims = [await start(queue) for _ in range(5)]
    calls: list[int] = []
    heads = queue.table.heads

    def counted(names):
        calls.append(len(names))
        return heads(names)

    monkeypatch.setattr(queue.table, "heads", counted)

    async def watch(name: str) -> int:
        return len([event async for event, _ in queue.watch(name)])

    watching = [asyncio.create_task(watch(claim.name)) for claim in claims for _ in range(20)]
    begin = time.monotonic()
    while not calls or calls[-1] < 5 or time.monotonic() - begin < 1.0:
        await asyncio.sleep(0.01)
    assert len(calls) <= 1 + (time.monotonic() - begin) / 0.25
    for claim in claims:
        await asyncio.to_thread(queue.table.finish, claim.name, claim.epoch, JobEnd(SUCCEEDED))
    assert await asyncio.wait_for(asyncio.gather(*watching), 20) == [3] * 100
    idle = len(calls)
    await asyncio.sleep(0.6)
    assert len(calls) <= idle + 1  # nobody watches, nobody asks


async def test_watching_a_job_that_goes_away(queue: JobQueue):
    claim = await start(queue)
    seen: list[int] = []

    async def watch() -> None:
        async for event, _ in queue.watch(claim.name):
            seen.append(event.sequence)

    with pytest.raises(LoralineError):
        async for _ in queue.watch("nobody"):
            pass
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.3)
    assert (await queue.get(claim.name)).state == RUNNING
    await asyncio.to_thread(queue.table.finish, claim.name, claim.epoch, JobEnd(SUCCEEDED))
    await queue.delete(claim.name)
    try:
        await asyncio.wait_for(watching, 10)
        assert seen == [1, 2, 3]  # it was quicker than the deletion
    except LoralineError as error:
        assert error.code is grpc.StatusCode.NOT_FOUND
