"""Series of jobs and live trainings: right figures, bounded labels, and gone when the run is over."""

import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client import generate_latest

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.core.config import CoreSettings
from loraline.core.db.schema import jobs as jobs_table
from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobHandler
from loraline.core.jobs.model import JobEnd
from loraline.core.serving.component import Component
from loraline.core.serving.opening import make_runners, open_platform

TRAIN = JobHandler("trainer.train", trainer_pb2.TrainRequest, "none:none")


@pytest.fixture
def platform(tmp_path: Path):
    opened = open_platform(CoreSettings(data_dir=tmp_path / "d"))
    yield opened
    opened.database.close()


def text_of(platform) -> str:
    return generate_latest(platform.registry).decode()


def request(run: str) -> trainer_pb2.TrainRequest:
    message = trainer_pb2.TrainRequest(name=run)
    message.base_model.hub_id = "Qwen/Qwen2.5-0.5B"
    return message


async def test_jobs_are_counted_by_kind_and_state_without_their_names(platform):
    make_runners(platform, [Component("trainer", {}, job_handlers=(TRAIN,))])
    assert 'loraline_jobs{kind="trainer.train",state="queued"} 0.0' in text_of(platform)
    jobs = [await platform.jobs.submit(TRAIN, request(f"run{n}")) for n in range(3)]
    platform.jobs.table.claim(["trainer.train"], "me", 30)
    text = text_of(platform)
    assert 'loraline_jobs{kind="trainer.train",state="queued"} 2.0' in text
    assert 'loraline_jobs{kind="trainer.train",state="running"} 1.0' in text
    assert 'loraline_jobs_submitted_total{kind="trainer.train"} 3.0' in text
    assert 'loraline_job_lease_takeovers_total{kind="trainer.train"} 0.0' in text
    assert 'loraline_job_queue_age_seconds{kind="trainer.train"}' in text
    for job in jobs:
        assert job.name not in text


async def test_a_job_that_stays_paused_shows_for_how_long(platform):
    make_runners(platform, [Component("trainer", {}, job_handlers=(TRAIN,))])
    assert 'loraline_job_pause_age_seconds{kind="trainer.train"} 0.0' in text_of(platform)
    job = await platform.jobs.submit(TRAIN, request("waits"))
    await platform.jobs.pause(job.name)
    with platform.database.begin() as connection:
        connection.execute(sa.update(jobs_table).values(update_time=time.time() - 7200))
    line = next(line for line in text_of(platform).splitlines() if line.startswith("loraline_job_pause_age_seconds{"))
    assert 7200 <= float(line.split()[-1]) < 7300
    assert 'loraline_job_queue_age_seconds{kind="trainer.train"} 0.0' in text_of(platform)


async def test_kinds_of_other_servers_are_left_to_them(platform):
    make_runners(platform, [Component("merger", {}, job_handlers=(JobHandler("merger.merge", job_pb2.Job, "x:y"),))])
    await platform.jobs.submit(TRAIN, request("run"))
    text = text_of(platform)
    assert 'loraline_jobs{kind="merger.merge",state="queued"} 0.0' in text
    assert 'loraline_jobs{kind="trainer.train"' not in text
    assert "loraline_training_" not in text


async def test_figures_of_a_training_live_as_long_as_the_run(platform):
    make_runners(platform, [Component("trainer", {}, job_handlers=(TRAIN,))])
    await platform.jobs.submit(TRAIN, request("mareva"))
    assert "loraline_training_loss" not in text_of(platform)
    claim = platform.jobs.table.claim(["trainer.train"], "me", 30)
    metrics = {"loss": 1.5, "token_accuracy": 0.8, "novel": 1.0}
    progress = job_pb2.Progress(fraction=0.25, step=50, total_steps=200, metrics=metrics)
    progress.eta.FromSeconds(90)
    platform.jobs.table.progress(claim.name, claim.epoch, progress)
    text = text_of(platform)
    labels = '{base_model="Qwen/Qwen2.5-0.5B",run="mareva"}'
    for name, value in (
        ("loss", 1.5),
        ("token_accuracy_ratio", 0.8),
        ("progress_ratio", 0.25),
        ("eta_seconds", 90.0),
        ("steps", 50.0),
        ("steps_planned", 200.0),
    ):
        assert f"loraline_training_{name}{labels} {value}" in text
    assert "novel" not in text, "figures that nobody declared would be series that no page explains"
    platform.jobs.table.finish(claim.name, claim.epoch, JobEnd(job_pb2.JOB_STATE_SUCCEEDED))
    text = text_of(platform)
    assert "loraline_training_" not in text
    assert 'loraline_jobs{kind="trainer.train",state="succeeded"} 1.0' in text


async def test_metrics_answer_while_the_database_does_not(platform, monkeypatch):
    make_runners(platform, [Component("trainer", {}, job_handlers=(TRAIN,))])

    def gone():
        raise OSError("gone")

    monkeypatch.setattr(platform.database, "read", gone)
    text = text_of(platform)
    assert "process_resident_memory_bytes" in text and "loraline_jobs{" not in text


def test_artifact_operations_are_counted(platform, tmp_path: Path):
    from loraline.api.artifact.v1 import artifact_pb2

    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.txt").write_bytes(b"x" * 1000)
    platform.library.publish(artifact_pb2.ARTIFACT_KIND_SOURCE, "raw", folder)
    text = text_of(platform)
    line = next(
        line for line in text.splitlines() if line.startswith('loraline_artifact_bytes_total{operation="publish"}')
    )
    assert float(line.split()[-1]) >= 1000
    assert 'loraline_artifact_operation_seconds_count{operation="publish"} 1.0' in text


def test_a_damaged_file_is_counted_where_the_alert_looks(platform, tmp_path: Path):
    from loraline.api.artifact.v1 import artifact_pb2

    name = "loraline_artifact_verification_failures_total"
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.txt").write_bytes(b"x" * 1000)
    made = platform.library.publish(artifact_pb2.ARTIFACT_KIND_SOURCE, "raw", folder)
    platform.library.verify(made.ref)
    assert platform.registry.get_sample_value(name) == 0
    (stored,) = [p for p in (tmp_path / "d").rglob("*") if p.is_file() and p.read_bytes() == b"x" * 1000]
    stored.chmod(0o600)
    stored.write_bytes(b"x" * 999 + b"y")
    with pytest.raises(LoralineError, match=r"x\.txt"):
        platform.library.verify(made.ref)
    assert platform.registry.get_sample_value(name) == 1
