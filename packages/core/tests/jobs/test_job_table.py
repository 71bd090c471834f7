"""The contract of the job table, on SQLite and on a real Postgres."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import status_pb2

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.core.db.database import Database
from loraline.core.errors import LoralineError
from loraline.core.jobs.model import (
    CANCELLED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TRANSITIONS,
    Claim,
    JobEnd,
    LeaseLost,
    NewJob,
    new_name,
    warning,
)
from loraline.core.jobs.sql_table import open_table
from loraline.core.jobs.table import JobTable

KIND = "trainer.train"
KINDS = [KIND]
LOST = warning("WORKER_LOST", "The process was killed by SIGKILL.", signal="SIGKILL")


def new(run: str = "run", request_id: str = "", kind: str = KIND, **labels: str) -> NewJob:
    return NewJob(kind, trainer_pb2.TrainRequest(name=run, request_id=request_id), request_id, labels=labels)


def claimed(table: JobTable, lease: float = 30.0, **fields: str) -> Claim:
    table.create(new(**fields))
    claim = table.claim(KINDS, "me", lease)
    assert claim is not None
    return claim


def changes(table: JobTable, name: str) -> list[tuple[int, int]]:
    events, _ = table.events(name)
    changed = [event.state_change for event in events if event.WhichOneof("event") == "state_change"]
    return [(getattr(change, "from"), change.to) for change in changed]


def check_sequence(table: JobTable, name: str) -> None:
    events, job = table.events(name, limit=100_000)
    assert [event.sequence for event in events] == list(range(1, job.last_sequence + 1))


# ------------------------------------------------------------------------------------------------------------- create


def test_created_job_is_the_request(table: JobTable):
    request = trainer_pb2.TrainRequest(name="mareva", request_id="r")
    ref = artifact_pb2.ArtifactRef(
        kind=artifact_pb2.ARTIFACT_KIND_DATASET, name="d", version=3, digest="sha256:" + "0" * 64
    )
    job, created = table.create(NewJob(KIND, request, "r", inputs=(ref,), labels={"team": "a"}))
    assert created
    assert job == table.get(job.name)
    spec = trainer_pb2.TrainRequest()
    assert job.spec.Unpack(spec) and spec == request
    assert list(job.inputs) == [ref]
    assert dict(job.labels) == {"team": "a"}
    assert (job.state, job.attempt, job.last_sequence, job.request_id) == (QUEUED, 0, 1, "r")
    assert abs(job.create_time.seconds - time.time()) < 60
    assert not job.HasField("start_time") and not job.HasField("error") and not job.HasField("progress")
    assert changes(table, job.name) == [(0, QUEUED)]


def test_names_are_kind_and_random():
    names = {new_name("trainer.train") for _ in range(1000)}
    assert len(names) == 1000
    assert all(name.startswith("trainer-train-") and len(name) == len("trainer-train-") + 12 for name in names)


def test_same_request_gives_same_job_and_other_body_is_refused(table: JobTable):
    first, created = table.create(new("a", "r1"))
    again, created_again = table.create(new("a", "r1"))
    assert (created, created_again, again) == (True, False, first)
    with pytest.raises(LoralineError) as caught:
        table.create(new("b", "r1"))
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert first.name in caught.value.message and caught.value.metadata["job"] == first.name
    other_kind, created = table.create(new("b", "r1", kind="trainer.diagnose"))
    assert created and other_kind.name != first.name
    assert table.create(new("a"))[0].name != table.create(new("a"))[0].name  # without a request_id each is new


def test_request_id_is_free_again_after_delete(table: JobTable):
    first, _ = table.create(new("a", "r1"))
    table.request_stop(first.name, "cancel")
    table.delete(first.name)
    second, created = table.create(new("b", "r1"))
    assert created and second.name != first.name
    assert table.events(second.name)[1].last_sequence == 1


def test_racing_creates_make_one_job(table: JobTable):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: table.create(new("a", "r1")), range(16)))
    assert len({job.name for job, _ in made}) == 1
    assert sum(created for _, created in made) == 1


def test_unknown_names(table: JobTable):
    calls: list[Callable[[], object]] = [
        lambda: table.get("nobody"),
        lambda: table.events("nobody"),
        lambda: table.request_stop("nobody", "cancel"),
        lambda: table.resume("nobody"),
        lambda: table.delete("nobody"),
    ]
    for call in calls:
        with pytest.raises(LoralineError) as caught:
            call()
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert table.heads(["nobody"]) == {}


# -------------------------------------------------------------------------------------------------------------- claim


def test_claim_takes_the_oldest_of_its_kinds(table: JobTable):
    table.create(new(kind="merger.merge"))
    first, _ = table.create(new("a"))
    table.create(new("b"))
    claim = table.claim(KINDS, "me", 30)
    assert claim is not None and (claim.name, claim.epoch, claim.attempt) == (first.name, 1, 1)
    assert 0 <= claim.queue_seconds < 60
    job = table.get(first.name)
    assert job.state == RUNNING and job.HasField("start_time")
    assert table.claim(["datagen.convert"], "me", 30) is None


def test_every_job_is_claimed_once_by_racing_runners(open_database: Callable[[], Database]):
    tables = [open_table(open_database()) for _ in range(8)]
    names = {tables[0].create(new(f"r{n}"))[0].name for n in range(40)}
    start = threading.Barrier(8)

    def take(table: JobTable) -> list[str]:
        start.wait()
        taken: list[str] = []
        while (claim := table.claim(KINDS, "me", 30)) is not None:
            taken.append(claim.name)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [name for part in pool.map(take, tables) for name in part]
    # A racer may see nothing while another holds the last rows; nothing is taken twice, and nothing stays.
    assert len(taken) == len(set(taken))
    while (claim := tables[0].claim(KINDS, "me", 30)) is not None:
        taken.append(claim.name)
    assert set(taken) == names and len(taken) == 40


def test_expired_lease_is_taken_over_and_the_stale_worker_is_fenced(table: JobTable, database: Database):
    stale = claimed(table, lease=0.2)
    assert table.reap(3) == []
    time.sleep(0.4)
    assert [(t.name, t.state) for t in table.reap(3)] == [(stale.name, QUEUED)]
    fresh = table.claim(KINDS, "other", 30)
    assert fresh is not None and (fresh.name, fresh.epoch, fresh.attempt) == (stale.name, 2, 2)
    before, _ = table.events(stale.name)
    writes: list[Callable[[], object]] = [
        lambda: table.heartbeat(stale.name, stale.epoch, 30),
        lambda: table.requested_stop(stale.name, stale.epoch),
        lambda: table.progress(stale.name, stale.epoch, job_pb2.Progress(fraction=0.9)),
        lambda: table.note(stale.name, stale.epoch, job_pb2.Note(message="x")),
        lambda: table.published(stale.name, stale.epoch, artifact_pb2.ArtifactRef(name="x")),
        lambda: table.finish(stale.name, stale.epoch, JobEnd(SUCCEEDED)),
        lambda: table.release(stale.name, stale.epoch),
        lambda: table.lost(stale.name, stale.epoch, LOST, 3),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    with pytest.raises(LeaseLost), database.begin() as connection:
        table.guard(connection, stale.name, stale.epoch)
    assert table.events(stale.name)[0] == before
    with database.begin() as connection:
        table.guard(connection, fresh.name, fresh.epoch)
    table.finish(fresh.name, fresh.epoch, JobEnd(SUCCEEDED))
    assert table.get(stale.name).state == SUCCEEDED


def test_reaping_spares_what_the_caller_keeps(table: JobTable):
    claim = claimed(table, lease=0.0)
    time.sleep(0.05)
    assert table.reap(3, keep=[claim.name]) == []
    assert [taken.name for taken in table.reap(3, keep=["another"])] == [claim.name]


def test_heartbeats_keep_the_lease(table: JobTable):
    claim = claimed(table, lease=0.5)
    for _ in range(4):
        time.sleep(0.3)
        assert table.heartbeat(claim.name, claim.epoch, 0.8) == ""
        assert table.reap(3) == []


def test_racing_reapers_take_a_job_once(open_database: Callable[[], Database]):
    tables = [open_table(open_database()) for _ in range(6)]
    for number in range(10):
        claimed(tables[0], lease=0.0, run=f"r{number}")
    time.sleep(0.1)
    with ThreadPoolExecutor(6) as pool:
        taken = [t.name for part in pool.map(lambda table: table.reap(3), tables) for t in part]
    assert len(taken) == len(set(taken)) == 10


def test_lost_processes_fail_the_job_after_max_attempts(table: JobTable):
    claim = claimed(table)
    assert table.lost(claim.name, claim.epoch, LOST, 3) == QUEUED
    for expected in (QUEUED, FAILED):
        again = table.claim(KINDS, "me", 30)
        assert again is not None
        assert table.lost(again.name, again.epoch, LOST, 3) == expected
    job = table.get(claim.name)
    error = LoralineError.from_status(job.error)
    assert (job.state, job.attempt, error.reason) == (FAILED, 3, "WORKER_LOST")
    assert error.metadata["signal"] == "SIGKILL" and error.metadata["losses"] == "3"
    resumed = table.resume(job.name)
    assert resumed.state == QUEUED and not resumed.HasField("error") and not resumed.HasField("end_time")
    once_more = table.claim(KINDS, "me", 30)
    assert once_more is not None and once_more.attempt == 4
    assert table.lost(once_more.name, once_more.epoch, LOST, 3) == QUEUED  # counting began anew
    check_sequence(table, job.name)


def test_handing_back_counts_no_loss(table: JobTable):
    claim = claimed(table)
    for _ in range(5):
        assert table.release(claim.name, claim.epoch) == QUEUED
        again = table.claim(KINDS, "me", 30)
        assert again is not None
        claim = again
    assert table.lost(claim.name, claim.epoch, LOST, 2) == QUEUED


# --------------------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize(("cause", "state"), [("cancel", CANCELLED), ("pause", PAUSED)])
def test_waiting_jobs_stop_at_once(table: JobTable, cause: str, state: int):
    job, _ = table.create(new())
    stopped = table.request_stop(job.name, cause)
    assert (stopped.state, stopped.requested_stop) == (state, "")
    assert stopped.HasField("pause") is (state == PAUSED)
    assert stopped.HasField("end_time") is (state == CANCELLED)
    assert table.claim(KINDS, "me", 30) is None
    assert table.resume(job.name).state == QUEUED
    assert table.claim(KINDS, "me", 30) is not None


@pytest.mark.parametrize(("cause", "state"), [("cancel", CANCELLED), ("pause", PAUSED)])
@pytest.mark.parametrize("how", ["release", "lost", "reap"])
def test_wishes_to_stop_survive_the_worker(table: JobTable, cause: str, state: int, how: str):
    claim = claimed(table, lease=0.0 if how == "reap" else 30.0)
    assert table.request_stop(claim.name, cause).requested_stop == cause
    if how == "release":
        table.release(claim.name, claim.epoch)
    elif how == "lost":
        table.lost(claim.name, claim.epoch, LOST, 3)
    else:
        time.sleep(0.05)
        table.reap(3)
    assert table.get(claim.name).state == state


def test_cancel_beats_pause_and_failure_but_not_success(table: JobTable):
    claim = claimed(table)
    table.request_stop(claim.name, "pause")
    assert table.request_stop(claim.name, "cancel").requested_stop == "cancel"
    assert table.request_stop(claim.name, "pause").requested_stop == "cancel"
    assert table.heartbeat(claim.name, claim.epoch, 30) == "cancel"
    status = status_pb2.Status(code=13, message="it broke")
    table.finish(claim.name, claim.epoch, JobEnd(FAILED, error=status))
    job = table.get(claim.name)
    assert job.state == CANCELLED and not job.HasField("error")
    notes = [event.note.message for event in table.events(claim.name)[0] if event.HasField("note")]
    assert any("it broke" in text for text in notes)
    done = claimed(table)
    table.request_stop(done.name, "cancel")
    table.finish(done.name, done.epoch, JobEnd(SUCCEEDED))
    assert table.get(done.name).state == SUCCEEDED


def bring_to(table: JobTable, state: int) -> str:
    if state == QUEUED:
        return table.create(new())[0].name
    claim = claimed(table)
    if state != RUNNING:
        table.finish(claim.name, claim.epoch, JobEnd(state))
    return claim.name


@pytest.mark.parametrize("state", [QUEUED, RUNNING, PAUSED, SUCCEEDED, FAILED, CANCELLED])
def test_what_each_state_allows(table: JobTable, state: int):
    refused = {"resume": {QUEUED, RUNNING, SUCCEEDED}, "delete": {QUEUED, RUNNING, PAUSED}}
    refused["pause"] = {SUCCEEDED, FAILED, CANCELLED}
    actions: dict[str, Callable[[str], object]] = {
        "resume": table.resume,
        "delete": table.delete,
        "pause": lambda name: table.request_stop(name, "pause"),
        "cancel": lambda name: table.request_stop(name, "cancel"),
    }
    for action, call in actions.items():
        name = bring_to(table, state)
        if state in refused.get(action, set()):
            with pytest.raises(LoralineError) as caught:
                call(name)
            assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
            assert "`loraline jobs " in caught.value.message  # what can be done instead
            assert table.get(name).state == state
        else:
            call(name)
        for before, after in changes(table, name) if action != "delete" or state in refused["delete"] else []:
            assert before == 0 or after in TRANSITIONS[before]
        # leave nothing QUEUED for the next claim
        if action != "delete" and table.get(name).state in {QUEUED, PAUSED}:
            table.request_stop(name, "cancel")
    ended = {SUCCEEDED, FAILED, CANCELLED}
    if state in ended:
        name = bring_to(table, state)
        assert table.request_stop(name, "cancel").state == state


def test_illegal_ends_are_refused(table: JobTable):
    claim = claimed(table)
    with pytest.raises(LoralineError):
        table.finish(claim.name, claim.epoch, JobEnd(RUNNING))
    assert table.get(claim.name).state == RUNNING


# -------------------------------------------------------------------------------------------------------------- events


def test_log_tells_everything_in_order(table: JobTable):
    claim = claimed(table)
    name, epoch = claim.name, claim.epoch
    ref = artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_ADAPTER, name="a", version=1, digest="sha256:x")
    table.progress(name, epoch, job_pb2.Progress(fraction=0.25, metrics={"loss": 2.0}))
    table.progress(name, epoch, job_pb2.Progress(fraction=0.5), log=False)
    assert table.get(name).progress.fraction == 0.5
    table.note(name, epoch, warning("TRUNCATED_ROWS", "3 rows were cut.", rows=3))
    table.published(name, epoch, ref)
    table.published(name, epoch, ref)
    table.finish(name, epoch, JobEnd(SUCCEEDED), job_pb2.Progress(fraction=1.0))
    events, job = table.events(name)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["state_change"] * 2 + ["progress", "note", "published", "progress", "state_change"]
    assert [event.attempt for event in events] == [0, 1, 1, 1, 1, 1, 1]
    assert list(job.outputs) == [ref]
    assert (job.state, job.progress.fraction, job.HasField("end_time")) == (SUCCEEDED, 1.0, True)
    check_sequence(table, name)
    later, _ = table.events(name, after=5)
    assert later == events[5:]
    few, _ = table.events(name, after=2, limit=2)
    assert few == events[2:4]


def test_sequences_have_no_gaps_under_concurrency(open_database: Callable[[], Database]):
    tables = [open_table(open_database()) for _ in range(6)]
    claim = claimed(tables[0])

    def write(table: JobTable) -> None:
        for number in range(15):
            table.note(claim.name, claim.epoch, job_pb2.Note(message=str(number)))
            table.progress(claim.name, claim.epoch, job_pb2.Progress(step=number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, tables))
    assert tables[0].get(claim.name).last_sequence == 2 + 6 * 30
    check_sequence(tables[0], claim.name)


def test_a_reader_never_sees_a_job_ahead_of_its_log(open_database: Callable[[], Database]):
    writer, reader = open_table(open_database()), open_table(open_database())
    claim = claimed(writer)
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            writer.note(claim.name, claim.epoch, job_pb2.Note(message=str(number)))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    after = 0
    while not done.is_set() or after < 62:
        events, job = reader.events(claim.name, after, 1000)
        assert [event.sequence for event in events] == list(range(after + 1, job.last_sequence + 1))
        after = job.last_sequence
    thread.join()


# ---------------------------------------------------------------------------------------------------------------- list


def test_pages_are_newest_first_and_complete(table: JobTable):
    names = [table.create(new(f"r{n}"))[0].name for n in range(7)]
    seen: list[str] = []
    token = ""
    for _ in range(10):
        page, token = table.page(page_size=3, page_token=token)
        seen += [job.name for job in page]
        table.create(new("later"))  # does not disturb the pages after the first
        if not token:
            break
    assert seen == list(reversed(names))


def test_filters(table: JobTable):
    table.create(new(kind="merger.merge"))
    a, _ = table.create(new(team="a", stage="x"))
    b, _ = table.create(new(team="b"))
    running = table.claim(KINDS, "me", 30)
    assert running is not None and running.name == a.name

    def found(**filters: object) -> list[str]:
        return [job.name for job in table.page(**filters)[0]]  # type: ignore[arg-type]

    assert found(kind_prefix="trainer.") == [b.name, a.name]
    assert found(kind_prefix="traine_") == []
    assert found(states=[RUNNING]) == [a.name]
    assert found(states=[RUNNING, QUEUED], kind_prefix=KIND) == [b.name, a.name]
    assert found(labels={"team": "a"}) == [a.name]
    assert found(labels={"team": "a", "stage": "y"}) == []
    assert found(labels={"team": "a", "stage": "x"}) == [a.name]


def test_foreign_page_tokens_are_refused(table: JobTable):
    for _ in range(3):
        table.create(new())
    _, token = table.page(page_size=1)
    for filters in ({"page_token": "nonsense"}, {"page_token": "///"}, {"page_token": token, "kind_prefix": "merger."}):
        with pytest.raises(LoralineError) as caught:
            table.page(page_size=1, **filters)  # type: ignore[arg-type]
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT and "page_token" in caught.value.fields


def test_delete_leaves_no_rows(table: JobTable, database: Database):
    claim = claimed(table)
    table.create(new(team="a"))
    table.finish(claim.name, claim.epoch, JobEnd(SUCCEEDED))
    table.delete(claim.name)
    with database.read() as connection:
        left = connection.execute(sa.text("SELECT count(*) FROM job_events WHERE job = :n"), {"n": claim.name}).scalar()
    assert left == 0
    with pytest.raises(LoralineError):
        table.get(claim.name)


def test_queue_states_and_heads(table: JobTable):
    waiting, _ = table.create(new(kind="merger.merge"))
    claim = claimed(table)
    time.sleep(0.05)
    states = {state.kind: state for state in table.queue_states()}
    assert (states["merger.merge"].queued, states["merger.merge"].running) == (1, 0)
    assert 0.05 <= states["merger.merge"].oldest_seconds < 60
    assert (states[KIND].queued, states[KIND].running, states[KIND].oldest_seconds) == (0, 1, 0.0)
    assert table.heads([waiting.name, claim.name, "nobody"]) == {waiting.name: (1, QUEUED), claim.name: (2, RUNNING)}


def test_listeners_hear_of_queued_jobs(table: JobTable, database: Database):
    heard: list[int] = []
    end = open_table(database).on_queued(lambda: heard.append(1))  # another table on the same database object
    job, _ = table.create(new("a", "r"))
    table.create(new("a", "r"))  # nothing new
    assert len(heard) == 1
    table.request_stop(job.name, "pause")
    table.resume(job.name)
    assert len(heard) == 2
    end()
    table.create(new())
    assert len(heard) == 2
