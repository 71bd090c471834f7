"""Runners with real child processes: ends, stops, kills and take-overs."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from google.protobuf.struct_pb2 import Struct
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.errors import LoralineError
from loraline.core.jobs.model import CANCELLED, ENDED, FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED, QueueState
from loraline.core.jobs.observer import NoObserver
from loraline.core.jobs.payload import settings_to_json
from loraline.core.jobs.queue import JobQueue
from loraline.core.jobs.runner import JobRunner
from loraline.core.jobs.sql_table import open_table
from loraline.core.serving.metrics import JobMetrics
from loraline.core.testing import jobs as testing
from loraline.core.testing.waiting import alive, until, until_state

StartRunner = Callable[..., Awaitable[JobRunner]]
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
DATASET = artifact_pb2.ARTIFACT_KIND_DATASET


def steps(settings: CoreSettings, name: str) -> list[tuple[int, int]]:
    """Return the steps that a counting job did, each with the attempt that did it."""
    path = settings.data_dir / "jobs" / name / "steps.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), int(attempt)) for step, attempt in (line.split() for line in lines)]


async def counting(queue: JobQueue, settings: CoreSettings, to: int = 1000, **wish: object) -> str:
    """Submit a counting job and return its name once it has done a few steps."""
    job = await queue.submit(testing.COUNT, testing.struct(to=to, seconds=0.05, **wish))
    await until(lambda: len(steps(settings, job.name)) >= 3, "the first steps")
    return job.name


@pytest.fixture
def runner_process(settings: CoreSettings) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def _start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "loraline.core.testing.job_runner"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(settings_to_json(settings)).encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        return process

    yield _start
    for process in started:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------------------------------- ends


async def test_success(queue: JobQueue, settings: CoreSettings, database: Database, start_runner: StartRunner):
    await start_runner()
    request = testing.struct(to=4, seconds=0.01, publish="numbers")
    job = await queue.submit(testing.COUNT, request, labels={"a": "b"})
    done = await until_state(queue, job.name, ENDED)
    assert (done.state, done.attempt, done.progress.fraction, done.progress.step) == (SUCCEEDED, 1, 1.0, 4)
    result = Struct()
    assert done.result.Unpack(result) and result["done"] == 4
    assert [(ref.kind, ref.name, ref.version) for ref in done.outputs] == [(DATASET, "numbers", 1)]
    artifact = ArtifactLibrary.open(settings, database).get(done.outputs[0])
    assert artifact.job == job.name and artifact.digest == done.outputs[0].digest
    kinds = [event.WhichOneof("event") for event in await queue.events(job.name)]
    assert kinds[:3] == ["state_change", "state_change", "note"] and kinds[-1] == "state_change"
    assert "published" in kinds and "progress" in kinds


FAILURES = {
    "exception": ("JOB_CRASHED", "ValueError: the flux is out of range (jobs.py:"),
    "typed": ("ROW_INVALID", "Row 7 of train.jsonl has no messages."),
    "memory": ("OUT_OF_MEMORY", "batch size"),
    "disk": ("DISK_FULL", "/data/checkpoint"),
    "sys_exit": ("JOB_CRASHED", "SystemExit: a library thought it may do this"),
    "exit": ("WORKER_LOST", "exited with code 3"),
    "abort": ("WORKER_LOST", "SIGABRT"),
    "kill": ("WORKER_LOST", "probably because memory ran out"),
}


@on_sqlite
async def test_failures_explain_themselves(queue: JobQueue, settings: CoreSettings, start_runner: StartRunner):
    await start_runner(max_attempts=1, max_concurrent_jobs=3)
    jobs = {how: await queue.submit(testing.CRASH, testing.struct(how=how)) for how in FAILURES}
    for how, (reason, text) in FAILURES.items():
        job = await until_state(queue, jobs[how].name, ENDED)
        error = LoralineError.from_status(job.error)
        assert (job.state, job.attempt, error.reason) == (FAILED, 1, reason), (how, job)
        assert text in error.message
        if reason == "WORKER_LOST":
            assert "about to fail" in error.metadata["log_tail"]
            assert "verysecret" not in str(job)
        if how == "typed":
            assert error.fields == {"rows": "7"}


@on_sqlite
async def test_killed_jobs_are_started_max_attempts_times(queue: JobQueue, start_runner: StartRunner):
    await start_runner(max_attempts=2)
    job = await queue.submit(testing.CRASH, testing.struct(how="kill"))
    done = await until_state(queue, job.name, ENDED)
    assert (done.state, done.attempt) == (FAILED, 2)


@on_sqlite
async def test_a_job_that_pauses_itself(queue: JobQueue, start_runner: StartRunner):
    await start_runner()
    job = await queue.submit(testing.QUOTA, testing.struct())
    paused = await until_state(queue, job.name, {PAUSED, *ENDED})
    assert (paused.state, paused.pause.reason, paused.progress.fraction) == (PAUSED, "QUOTA_EXHAUSTED", 0.25)
    await queue.resume(job.name)
    done = await until_state(queue, job.name, ENDED)
    assert (done.state, done.attempt, done.HasField("pause")) == (SUCCEEDED, 2, False)


@on_sqlite
async def test_concurrency_limit_and_observer(queue: JobQueue, start_runner: StartRunner):
    heard: Counter[str] = Counter()

    class Observer(NoObserver):
        def job_submitted(self, kind: str) -> None:
            heard["submitted " + kind] += 1

        def job_started(self, kind: str, queue_seconds: float) -> None:
            heard["started " + kind] += 1
            assert 0 <= queue_seconds < 60

        def job_finished(self, kind: str, state: str, seconds: float) -> None:
            heard[f"{state} {kind}"] += 1

        def lease_takeover(self, kind: str) -> None:
            heard["takeover"] += 1

        def queue_state(self, state: QueueState) -> None:
            heard["queue_state"] += 1

    # Queued first: the runner reports queues with jobs in them only, at its first look and then every five seconds.
    jobs = [await queue.submit(testing.COUNT, testing.struct(to=5, seconds=0.05)) for _ in range(3)]
    runner = await start_runner(observer=Observer(), max_concurrent_jobs=2)
    most = 0
    while len((await queue.list(states=list(ENDED)))[0]) < len(jobs):
        most = max(most, len((await queue.list(states=[RUNNING]))[0]), len(runner.running))
        await asyncio.sleep(0.02)
    assert most == 2
    await until(lambda: not runner.running, "the last supervisor")
    assert heard["started test.count"] == heard["SUCCEEDED test.count"] == 3
    await until(lambda: heard["queue_state"] >= 1, "a report of the queue")
    assert heard["takeover"] == 0


@on_sqlite
async def test_secrets_reach_the_child_by_pipe_only(queue: JobQueue, settings: CoreSettings, start_runner: StartRunner):
    runner = await start_runner(s3_secret_key=SecretStr("topsecret-value"))
    name = await counting(queue, settings)
    pid = runner.child_pids[name]
    for file in ("cmdline", "environ"):
        assert b"topsecret-value" not in Path(f"/proc/{pid}/{file}").read_bytes()
    await queue.cancel(name)
    await until_state(queue, name, ENDED)


# --------------------------------------------------------------------------------------------------------------- stops


async def test_cancel(queue: JobQueue, settings: CoreSettings, start_runner: StartRunner):
    runner = await start_runner()
    name = await counting(queue, settings)
    pid = runner.child_pids[name]
    assert (await queue.cancel(name)).requested_stop == "cancel"
    job = await until_state(queue, name, ENDED, seconds=10)
    assert (job.state, job.requested_stop, job.HasField("error")) == (CANCELLED, "", False)
    await until(lambda: not alive(pid), "the child's end", 5)


async def test_pause_and_resume_go_on_where_it_stopped(
    queue: JobQueue, settings: CoreSettings, start_runner: StartRunner
):
    await start_runner()
    name = await counting(queue, settings, to=25)
    await queue.pause(name)
    paused = await until_state(queue, name, {PAUSED}, seconds=10)
    assert paused.pause.reason == "USER_REQUEST" and name in paused.pause.message
    stopped_at = len(steps(settings, name))
    assert 3 <= stopped_at < 25
    assert paused.progress.step == stopped_at  # the last report lands
    await asyncio.sleep(0.5)
    assert len(steps(settings, name)) == stopped_at
    await queue.resume(name)
    done = await until_state(queue, name, ENDED)
    assert (done.state, done.attempt) == (SUCCEEDED, 2)
    assert steps(settings, name) == [(n, 1 if n <= stopped_at else 2) for n in range(1, 26)]
    folder = settings.data_dir / "jobs" / name
    assert (folder / "log.txt").exists() and (folder / "log.1.txt").exists()
    await queue.delete(name)
    assert not folder.exists()


@on_sqlite
async def test_a_stubborn_job_is_killed_after_the_grace(
    queue: JobQueue, settings: CoreSettings, start_runner: StartRunner
):
    await start_runner(stop_grace_seconds=0.5)
    name = await counting(queue, settings, stubborn=True)
    await queue.cancel(name)
    job = await until_state(queue, name, ENDED, seconds=10)
    assert job.state == CANCELLED
    notes = [event.note.reason for event in await queue.events(name) if event.HasField("note")]
    assert "STOPPED_HARD" in notes


@on_sqlite
async def test_cancel_right_after_submit(queue: JobQueue, start_runner: StartRunner):
    """Whatever the child was doing when the wish came, down to starting its interpreter, the job is CANCELLED."""
    await start_runner(max_concurrent_jobs=4)
    names: list[str] = []
    for number in range(6):
        names.append((await queue.submit(testing.COUNT, testing.struct(to=1000, seconds=0.05))).name)
        await asyncio.sleep(number * 0.1)
        await queue.cancel(names[-1])
    for name in names:
        assert (await until_state(queue, name, ENDED)).state == CANCELLED


@on_sqlite
@pytest.mark.parametrize(("wish", "state"), [("cancel", CANCELLED), ("pause", PAUSED), ("drain", QUEUED)])
async def test_a_job_that_only_loads_stops_at_once(
    queue: JobQueue, settings: CoreSettings, start_runner: StartRunner, wish: str, state: int
):
    runner = await start_runner()  # its grace is twenty seconds, the import takes thirty
    job = await queue.submit(testing.SLOW_IMPORT, testing.struct())
    await until((settings.data_dir / "jobs" / job.name / "loading").exists, "the import")
    assert (await queue.get(job.name)).progress.message in ("", "loading libraries")
    begin = time.monotonic()
    if wish == "drain":
        await runner.drain()
    else:
        await {"cancel": queue.cancel, "pause": queue.pause}[wish](job.name)
    stopped = await until_state(queue, job.name, {state}, seconds=10)
    assert time.monotonic() - begin < 5
    assert not stopped.HasField("error")


async def test_draining_hands_the_job_over(queue: JobQueue, settings: CoreSettings, start_runner: StartRunner):
    runner = await start_runner(max_attempts=1)
    name = await counting(queue, settings, to=25)
    begin = time.monotonic()
    await runner.drain()
    assert time.monotonic() - begin < 10
    assert runner.running == ()
    job = await queue.get(name)
    assert (job.state, job.attempt) == (QUEUED, 1)
    stopped_at = len(steps(settings, name))
    await start_runner(max_attempts=1)
    done = await until_state(queue, name, ENDED)
    assert (done.state, done.attempt) == (SUCCEEDED, 2)
    assert steps(settings, name) == [(n, 1 if n <= stopped_at else 2) for n in range(1, 26)]


# --------------------------------------------------------------------------------------------------------------- kills


async def test_killed_child_is_started_again(queue: JobQueue, settings: CoreSettings, start_runner: StartRunner):
    runner = await start_runner()
    name = await counting(queue, settings, to=25)
    os.kill(runner.child_pids[name], signal.SIGKILL)
    done = await until_state(queue, name, ENDED)
    assert (done.state, done.attempt) == (SUCCEEDED, 2)
    # The step in progress at the kill may be done again, none is left out.
    assert {step for step, _ in steps(settings, name)} == set(range(1, 26))
    changes = [event.state_change for event in await queue.events(name) if event.HasField("state_change")]
    assert [change.to for change in changes] == [QUEUED, RUNNING, QUEUED, RUNNING, SUCCEEDED]


async def test_killed_runner_takes_its_children_along_and_another_takes_over(
    queue: JobQueue,
    settings: CoreSettings,
    start_runner: StartRunner,
    runner_process: Callable[[], subprocess.Popen[bytes]],
):
    process = await asyncio.to_thread(runner_process)
    job = await queue.submit(testing.FAMILY, testing.struct())
    pid_file = settings.data_dir / "jobs" / job.name / "grandchild.pid"
    await until(lambda: pid_file.exists() and pid_file.read_text(), "the grandchild")
    grandchild = int(pid_file.read_text())
    child = int(Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[1])
    assert alive(child) and alive(grandchild) and os.getpgid(grandchild) == child
    killed_at = time.monotonic()
    process.kill()
    await until(lambda: not alive(child) and not alive(grandchild), "the death of the whole group", 5)
    pid_file.unlink()
    registry = CollectorRegistry()
    metrics = JobMetrics(registry)
    metrics.announce([testing.FAMILY.kind])
    await start_runner(observer=metrics)
    await until(lambda: pid_file.exists() and pid_file.read_text(), "the take-over")
    taken_over = registry.get_sample_value("loraline_job_lease_takeovers_total", {"kind": testing.FAMILY.kind})
    assert taken_over == 1, "the alert LeaseTakeovers waits for it"
    assert time.monotonic() - killed_at < settings.lease_seconds + 20
    taken = await queue.get(job.name)
    assert (taken.state, taken.attempt) == (RUNNING, 2)
    reasons = [event.note.reason for event in await queue.events(job.name) if event.HasField("note")]
    assert reasons == ["WORKER_LOST"]
    await queue.cancel(job.name)
    await until_state(queue, job.name, ENDED)


@on_sqlite
async def test_terminated_runner_process_hands_over(
    queue: JobQueue, settings: CoreSettings, runner_process: Callable[[], subprocess.Popen[bytes]]
):
    process = await asyncio.to_thread(runner_process)
    name = await counting(queue, settings)
    process.terminate()
    assert await asyncio.to_thread(process.wait, 20) == 0
    job = await queue.get(name)
    assert (job.state, job.attempt) == (QUEUED, 1)


@on_sqlite
async def test_a_blocked_event_loop_keeps_its_leases(
    queue: JobQueue, settings: CoreSettings, start_runner: StartRunner
):
    await start_runner(lease_seconds=1.0)
    name = await counting(queue, settings)
    time.sleep(2.5)  # the loop of the server stalls
    assert queue.table.reap(3) == []
    assert (await queue.get(name)).state == RUNNING
    await queue.cancel(name)
    await until_state(queue, name, ENDED)


@on_sqlite
async def test_a_lease_that_ran_out_in_sleep_is_not_taken_from_oneself(
    queue: JobQueue, settings: CoreSettings, database: Database, start_runner: StartRunner
):
    await start_runner(lease_seconds=3.0)
    name = await counting(queue, settings)
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE jobs SET lease_expires = 1 WHERE name = :n"), {"n": name})
    await asyncio.sleep(2.5)  # several looks of the runner, and a heartbeat that renews the lease
    assert queue.table.reap(3) == []
    job = await queue.get(name)
    assert (job.state, job.attempt) == (RUNNING, 1)
    await queue.cancel(name)
    await until_state(queue, name, ENDED)


@on_sqlite
async def test_orphans_of_a_group_are_collected(queue: JobQueue, settings: CoreSettings, start_runner: StartRunner):
    """Where the server is process 1, or a subreaper as here, whatever a killed child leaves behind becomes its own."""
    libc = ctypes.CDLL(None)
    set_subreaper = 36
    assert libc.prctl(set_subreaper, 1) == 0
    try:
        runner = await start_runner(max_attempts=1)
        job = await queue.submit(testing.FAMILY, testing.struct())
        pid_file = settings.data_dir / "jobs" / job.name / "grandchild.pid"
        await until(lambda: pid_file.exists() and pid_file.read_text(), "the grandchild")
        os.kill(runner.child_pids[job.name], signal.SIGKILL)
        await until_state(queue, job.name, {FAILED})
        assert not Path(f"/proc/{int(pid_file.read_text())}").exists()
    finally:
        libc.prctl(set_subreaper, 0)


@on_sqlite
async def test_a_child_that_lost_its_lease_is_killed_and_writes_nothing(
    queue: JobQueue, settings: CoreSettings, database: Database, start_runner: StartRunner
):
    runner = await start_runner(lease_seconds=1.5)
    name = await counting(queue, settings, stubborn=True, publish="late")
    pid = runner.child_pids[name]
    with database.begin() as connection:  # as a runner elsewhere would do after a pause of this machine
        connection.execute(sa.text("UPDATE jobs SET lease_expires = 1 WHERE name = :n"), {"n": name})
    elsewhere = open_table(database)
    while not (taken := elsewhere.reap(3)):
        await asyncio.sleep(0)
    claim = elsewhere.claim(["test.count"], "elsewhere", 60)
    assert claim is not None and [t.name for t in taken] == [name]
    await until(lambda: not alive(pid), "the stale child's end", 15)
    job = await queue.get(name)
    assert (job.state, job.attempt, list(job.outputs)) == (RUNNING, 2, [])
    written = [event.attempt for event in await queue.events(name)]
    assert written == sorted(written)
    elsewhere.release(name, claim.epoch)
    await queue.cancel(name)


@pytest.mark.slow
async def test_published_once_over_random_kills(
    queue: JobQueue, settings: CoreSettings, database: Database, start_runner: StartRunner
):
    """Ten kills at random moments, most of them around the publish; one version, one output, no gap in the log."""
    runner = await start_runner(max_attempts=100)
    job = await queue.submit(testing.COUNT, testing.struct(to=4, seconds=0.02, publish="once", linger=0.6))
    for number in range(10):
        attempt = number + 1
        while (await queue.get(job.name)).attempt < attempt or job.name not in runner.child_pids:
            await asyncio.sleep(0.01)
        pid = runner.child_pids[job.name]
        begun = settings.data_dir / "jobs" / job.name / "result" / "train.jsonl"
        if number >= 2:
            await until(begun.exists, "the publish")
        # From before the first import to well into the time after the publish.
        await asyncio.sleep(0.3 * number if number < 2 else 0.9 + 0.08 * number)
        if (await queue.get(job.name)).state in ENDED:
            break
        os.kill(pid, signal.SIGKILL)
        await until(lambda pid=pid: runner.child_pids.get(job.name) != pid, "the next attempt")
    done = await until_state(queue, job.name, ENDED)
    assert done.state == SUCCEEDED and done.attempt >= 3
    artifacts, _ = ArtifactLibrary.open(settings, database).list(kind=DATASET, name="once")
    assert [artifact.ref for artifact in artifacts] == list(done.outputs) and len(artifacts) == 1
    events = await queue.events(job.name, limit=10_000)
    assert [event.sequence for event in events] == list(range(1, done.last_sequence + 1))
    assert sum(event.HasField("published") for event in events) == 1
    assert job_pb2.JobState.Name(done.state) == "JOB_STATE_SUCCEEDED"
