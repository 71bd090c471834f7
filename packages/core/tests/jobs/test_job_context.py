"""What a handler sees: progress, remarks, publishing under a lease, wishes to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.errors import LoralineError, unavailable
from loraline.core.jobs import endings
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.handlers import StopRequested
from loraline.core.jobs.loading import StopSignal
from loraline.core.jobs.model import LeaseLost, NewJob
from loraline.core.jobs.sql_table import SqlJobTable
from loraline.core.testing.jobs import struct

DATASET, CHECKPOINT = artifact_pb2.ARTIFACT_KIND_DATASET, artifact_pb2.ARTIFACT_KIND_CHECKPOINT
MakeContext = Callable[..., JobContext]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'jobs.db'}"


class CountingTable(SqlJobTable):
    """Counts writes of progress, and can be out of reach."""

    writes = 0
    out_of_reach = False

    def progress(self, name: str, epoch: int, progress: job_pb2.Progress, *, log: bool = True) -> None:
        if self.out_of_reach:
            raise unavailable("DATABASE_UNREACHABLE", "no route")
        self.writes += 1
        super().progress(name, epoch, progress, log=log)


@pytest.fixture
def counting(database: Database) -> CountingTable:
    return CountingTable(database)


@pytest.fixture
def make_context(counting: CountingTable, database: Database, settings: CoreSettings) -> MakeContext:
    """Claims the next job of the kind `test.count`, making one when none waits, as a child would hold it."""

    def _make(stop: StopSignal | None = None, progress: job_pb2.Progress | None = None) -> JobContext:
        claim = counting.claim(["test.count"], "me", 30)
        if claim is None:
            counting.create(NewJob("test.count", struct()))
            claim = counting.claim(["test.count"], "me", 30)
        assert claim is not None
        workdir = settings.data_dir / "jobs" / claim.name
        workdir.mkdir(parents=True, exist_ok=True)
        return JobContext(
            job=claim.name,
            kind=claim.kind,
            attempt=claim.attempt,
            epoch=claim.epoch,
            settings=settings,
            library=ArtifactLibrary.open(settings, database),
            database=database,
            table=counting,
            workdir=workdir,
            stop=stop,
            last_progress=progress,
        )

    return _make


def folder(tmp_path: Path, text: str) -> Path:
    place = tmp_path / f"folder-{text}"
    place.mkdir(exist_ok=True)
    (place / "train.jsonl").write_text(text)
    return place


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_is_cheap_and_the_newest_lands(make_context: MakeContext, counting: CountingTable):
    context = make_context()
    for step in range(1, 501):
        context.progress(step=step, total_steps=1000, metrics={"loss": 1 / step}, unit="step")
    assert counting.writes == 1
    time.sleep(1.4)  # nobody reports any more, yet the newest is written
    progress = counting.get(context.job).progress
    assert (counting.writes, progress.step, progress.fraction, progress.unit) == (2, 500, 0.5, "step")
    assert progress.metrics["loss"] == 1 / 500
    assert context.last_progress() is None
    context.progress(step=600, total_steps=1000)
    last = context.last_progress()
    assert last is not None and last.step == 600 and last.metrics["loss"] == 1 / 500  # metrics keep their last value
    done = context.last_progress(done=True)
    assert done is not None and done.fraction == 1.0 and not done.HasField("eta")


def test_an_attempt_shows_no_figures_of_the_one_before(make_context: MakeContext, counting: CountingTable):
    earlier = job_pb2.Progress(fraction=0.5, step=5, total_steps=10, unit="step", message="step 5")
    earlier.metrics["loss"] = 9.0
    earlier.eta.seconds = 30
    context = make_context(progress=earlier)
    context.begin()
    shown = counting.get(context.job).progress
    assert (shown.fraction, shown.step, shown.total_steps, shown.unit) == (0.5, 5, 10, "step")
    assert (dict(shown.metrics), shown.message, shown.HasField("eta")) == ({}, "", False)
    context.progress(step=6, total_steps=10, metrics={"accuracy": 0.5})
    last = context.last_progress(done=True)
    assert last is not None and dict(last.metrics) == {"accuracy": 0.5}


def test_eta_from_the_attempts_own_speed(make_context: MakeContext, counting: CountingTable):
    context = make_context()
    context.progress(step=50, total_steps=100)  # done by an earlier attempt: no measure of this one's speed
    time.sleep(1.1)
    context.progress(step=60, total_steps=100)
    assert 3 <= counting.get(context.job).progress.eta.seconds <= 8
    time.sleep(1.1)
    context.progress(fraction=0.9, eta_seconds=77)
    assert counting.get(context.job).progress.eta.seconds == 77
    context.progress(fraction=7.0)
    last = context.last_progress()
    assert last is not None and last.fraction == 1.0


def test_progress_waits_for_a_database_out_of_reach(make_context: MakeContext, counting: CountingTable):
    context = make_context()
    counting.out_of_reach = True
    context.progress(step=1, total_steps=2)
    counting.out_of_reach = False
    last = context.last_progress()
    assert last is not None and last.step == 1


# ------------------------------------------------------------------------------------------------------------- remarks


def test_notes(make_context: MakeContext, counting: CountingTable):
    context = make_context()
    context.note("3 rows were cut.", severity="warning", reason="TRUNCATED_ROWS", rows=3)
    note = counting.events(context.job)[0][-1].note
    assert (note.severity, note.reason, dict(note.fields)) == (
        job_pb2.SEVERITY_WARNING,
        "TRUNCATED_ROWS",
        {"rows": "3"},
    )
    with pytest.raises(LoralineError, match="info, warning, error"):
        context.note("x", severity="fatal")


def test_notes_without_end_stop_at_a_limit(make_context: MakeContext, counting: CountingTable, monkeypatch):
    monkeypatch.setattr("loraline.core.jobs.context._MAX_NOTES", 5)
    context = make_context()
    for number in range(20):
        context.note(str(number))
    notes = [event.note for event in counting.events(context.job)[0] if event.HasField("note")]
    assert len(notes) == 5 and notes[-1].reason == "TOO_MANY_NOTES"


# ------------------------------------------------------------------------------------------------------------- publish


def test_publish_adds_an_output_once(make_context: MakeContext, counting: CountingTable, tmp_path: Path):
    context = make_context()
    first = context.publish(DATASET, "numbers", folder(tmp_path, "a"), facts={"rows": 1})
    assert (first.job, first.ref.version) == (context.job, 1)
    counting.release(context.job, context.epoch)
    again = make_context()
    assert (again.job, again.attempt) == (context.job, 2)
    assert again.publish(DATASET, "numbers", folder(tmp_path, "b")).ref == first.ref  # made by the first attempt
    other = again.publish(DATASET, "others", folder(tmp_path, "b"))
    assert list(counting.get(context.job).outputs) == [first.ref, other.ref]


def test_publish_finds_what_a_killed_attempt_left(make_context: MakeContext, counting: CountingTable, tmp_path: Path):
    """The attempt died after the artifact was complete and before the job's record said so."""
    context = make_context()
    artifact = context.library.publish(DATASET, "numbers", folder(tmp_path, "a"), job=context.job)
    context.library.publish(DATASET, "numbers", folder(tmp_path, "b"), job="another")
    counting.lost(context.job, context.epoch, endings.death_note(-9), 3)
    again = make_context()
    assert again.publish(DATASET, "numbers", folder(tmp_path, "c")).ref == artifact.ref
    assert list(counting.get(context.job).outputs) == [artifact.ref]


def test_each_checkpoint_is_a_version(make_context: MakeContext, counting: CountingTable, tmp_path: Path):
    context = make_context()
    context.publish(CHECKPOINT, "run", folder(tmp_path, "a"))
    counting.release(context.job, context.epoch)
    again = make_context()
    assert again.publish(CHECKPOINT, "run", folder(tmp_path, "b")).ref.version == 2
    assert again.publish(CHECKPOINT, "run", folder(tmp_path, "c")).ref.version == 3
    assert list(counting.get(again.job).outputs) == []


def test_a_stale_worker_publishes_nothing(make_context: MakeContext, counting: CountingTable, tmp_path: Path):
    stale = make_context()
    counting.release(stale.job, stale.epoch)
    fresh = make_context()
    assert fresh.job == stale.job
    with pytest.raises(LeaseLost):
        stale.publish(DATASET, "numbers", folder(tmp_path, "stale"))
    with pytest.raises(LeaseLost):
        stale.progress(step=1)
    with pytest.raises(LeaseLost):
        stale.check_stop()
    assert fresh.library.list(kind=DATASET, name="numbers")[0] == []
    assert fresh.publish(DATASET, "numbers", folder(tmp_path, "fresh")).job == fresh.job


def test_a_lease_lost_while_publishing_leaves_no_artifact(
    make_context: MakeContext, counting: CountingTable, tmp_path: Path, monkeypatch
):
    context = make_context()
    write = context.library.store.write

    def slow_write(*args, **kwargs):
        written = write(*args, **kwargs)
        counting.release(context.job, context.epoch)  # between the upload and its last transaction
        return written

    monkeypatch.setattr(context.library.store, "write", slow_write)
    with pytest.raises(LeaseLost):
        context.publish(DATASET, "numbers", folder(tmp_path, "a"))
    assert context.library.list(kind=DATASET, name="numbers")[0] == []


def test_a_late_write_tells_the_handler_of_a_lost_lease(make_context: MakeContext, counting: CountingTable):
    context = make_context()
    context.progress(step=1, total_steps=2)
    assert context.stop_cause == ""
    context.progress(step=2, total_steps=2)
    counting.release(context.job, context.epoch)
    time.sleep(1.3)
    with pytest.raises(LeaseLost):
        context.check_stop()


# ---------------------------------------------------------------------------------------------------------------- stop


def test_stop_causes(make_context: MakeContext, counting: CountingTable):
    stop = StopSignal()
    context = make_context(stop)
    context.check_stop()
    stop.terminated.set()
    assert context.stop_cause == "handover"
    with pytest.raises(StopRequested, match="handover"):
        context.check_stop()
    counting.release(context.job, context.epoch)

    told = StopSignal()
    paused = make_context(told)
    assert paused.stop_cause == ""
    counting.request_stop(paused.job, "pause")
    told.terminated.set()
    assert paused.stop_cause == "pause"  # at once, though the database was asked a moment ago


def test_wishes_are_seen_without_a_signal(make_context: MakeContext, counting: CountingTable):
    context = make_context()
    context.check_stop()
    counting.request_stop(context.job, "cancel")
    time.sleep(1.1)
    with pytest.raises(StopRequested, match="cancel"):
        context.check_stop()
