"""Runs that go on on another machine: two machines are two data folders with one database and one store."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.jobs.model import ENDED
from loraline.core.jobs.runner import JobRunner
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.core.testing.waiting import until, until_state
from loraline.trainer import checkpoints
from loraline.trainer.config import TrainerSettings
from loraline.trainer.metrics import job_metrics
from loraline.trainer.published import bring, published_checkpoints
from loraline.trainer.servicer import TRAIN, TrainerServicer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NO_CONTEXT: Any = None


@pytest.fixture
async def machine(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[str], Platform]]:
    monkeypatch.setenv("LORALINE_TRAINER_PUBLISH_CHECKPOINTS", "always")
    opened: list[Platform] = []

    def open_machine(name: str) -> Platform:
        settings = CoreSettings(
            data_dir=tmp_path / name, database_url=f"sqlite:///{tmp_path / 'shared.db'}", auth="off",
            store_url=f"file://{tmp_path / 'store'}", allowed_paths=[small_base.parent], poll_seconds=0.05,
        )  # fmt: skip
        opened.append(open_platform(settings))
        return opened[-1]

    yield open_machine
    for platform in opened:
        platform.database.close()


@asynccontextmanager
async def runner(platform: Platform) -> AsyncIterator[None]:
    running = JobRunner(platform.settings, platform.jobs.table, [TRAIN], observer=platform.job_metrics)
    await running.start()
    try:
        yield
    finally:
        await running.drain()


def request(dataset: ap.ArtifactRef, base: Path, name: str, *, epochs: float = 4, policy: Any = 0) -> pb.TrainRequest:
    parameters = pb.TrainingParameters(
        epochs=epochs, learning_rate=5e-3, batch_size=4, lora=pb.LoraParameters(r=4, dropout=0.1), save_steps=1,
        lr_scheduler="constant", warmup_ratio=0,
    )  # fmt: skip
    return pb.TrainRequest(
        name=name, base_model=pb.BaseModel(path=str(base)), datasets=[pb.WeightedDataset(ref=dataset)],
        parameters=parameters, existing_run=policy,
    )  # fmt: skip


async def submit(platform: Platform, wanted: pb.TrainRequest) -> job_pb2.Job:
    return (await TrainerServicer(platform, TrainerSettings()).Train(wanted, NO_CONTEXT)).job


async def finished(platform: Platform, job: job_pb2.Job) -> tuple[str, pb.TrainResult, list[str]]:
    """Run a job to its end on this machine; return the digest of the weights, the result and the notes' reasons."""
    async with runner(platform):
        done = await until_state(platform.jobs, job.name, ENDED, seconds=300)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
    result = pb.TrainResult()
    done.result.Unpack(result)
    weights = platform.library.fetch(result.adapter) / "adapter_model.safetensors"
    events = await platform.jobs.events(job.name)
    return hashlib.sha256(weights.read_bytes()).hexdigest(), result, [event.note.reason for event in events]


async def handed_over(platform: Platform, job: job_pb2.Job, at_step: int) -> None:
    """Run a job here until checkpoints of some steps are in the store, then shut this machine down for good."""
    async with runner(platform):
        await until(
            lambda: any(
                artifact.facts["step"] >= at_step  # type: ignore[operator]
                for artifact in published_checkpoints(platform.library, job.labels["run"], {job.name})
            ),
            f"a checkpoint of step {at_step} in the store",
            seconds=200,
        )
    shutil.rmtree(platform.settings.data_dir)


async def published(platform: Platform, harbour: Path) -> ap.ArtifactRef:
    publish = platform.library.publish
    return (await asyncio.to_thread(publish, ap.ARTIFACT_KIND_DATASET, "harbour", harbour)).ref


async def test_another_machine_goes_on_to_the_same_adapter(
    machine: Callable[[str], Platform], harbour: Path, small_base: Path
) -> None:
    first = machine("first")
    dataset = await published(first, harbour)
    whole, result, _ = await finished(first, await submit(first, request(dataset, small_base, "whole")))
    assert result.resumed_from == ""
    job = await submit(first, request(dataset, small_base, "mareva"))
    await handed_over(first, job, at_step=3)
    second = machine("second")
    digest, result, notes = await finished(second, job)
    assert digest == whole
    assert "CHECKPOINT_FETCHED" in notes
    assert int(result.resumed_from.removeprefix("checkpoint-")) >= 3
    kept = published_checkpoints(second.library, "mareva", {job.name})
    assert [int(artifact.facts["step"]) for artifact in kept] == [24, 23]  # type: ignore[arg-type]
    outputs = (await second.jobs.get(job.name)).outputs
    assert [ref.kind for ref in outputs] == [ap.ARTIFACT_KIND_ADAPTER]
    run = (await TrainerServicer(second, TrainerSettings()).GetRun(pb.GetRunRequest(name="mareva"), NO_CONTEXT)).run
    assert run.checkpoints[0].step == 24
    assert run.checkpoints[0].artifact == kept[0].ref


async def test_a_finished_run_is_continued_and_overwritten_elsewhere(
    machine: Callable[[str], Platform], harbour: Path, small_base: Path
) -> None:
    first = machine("first")
    dataset = await published(first, harbour)
    whole, _, _ = await finished(first, await submit(first, request(dataset, small_base, "whole", epochs=2)))
    begun = await submit(first, request(dataset, small_base, "parts", epochs=1))
    await finished(first, begun)
    shutil.rmtree(first.settings.data_dir)
    second = machine("second")
    go_on = request(dataset, small_base, "parts", epochs=2, policy=pb.EXISTING_RUN_POLICY_CONTINUE)
    digest, result, notes = await finished(second, await submit(second, go_on))
    assert (digest, result.resumed_from) == (whole, "checkpoint-6")
    assert "RUN_CONTINUED" in notes
    anew = request(dataset, small_base, "parts", epochs=1, policy=pb.EXISTING_RUN_POLICY_OVERWRITE)
    last = await submit(second, anew)
    await finished(second, last)
    jobs, _ = await second.jobs.list(kind_prefix=TRAIN.kind, labels={"run": "parts"}, page_size=50)
    left = published_checkpoints(second.library, "parts", {job.name for job in jobs})
    assert {artifact.job for artifact in left} == {last.name}


async def test_uploaded_and_damaged_checkpoints_are_never_opened(
    machine: Callable[[str], Platform], tmp_path: Path
) -> None:
    platform = machine("one")
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"pickle of somebody")
    checkpoints.seal(folder)
    publish = platform.library.publish
    uploaded = publish(ap.ARTIFACT_KIND_CHECKPOINT, "mareva", folder, facts={"step": 3})
    assert published_checkpoints(platform.library, "mareva", {"trainer-train-1"}) == []
    assert published_checkpoints(platform.library, "mareva", set()) == []
    (folder / "optimizer.pt").write_bytes(b"something else")
    torn = publish(ap.ARTIFACT_KIND_CHECKPOINT, "mareva", folder, facts={"step": 4}, job="trainer-train-1")
    own = tmp_path / "own"
    with pytest.raises(LoralineError) as caught:
        bring(platform.library, torn, own)
    assert caught.value.reason == "CHECKPOINT_DAMAGED"
    assert list(own.iterdir()) == []
    assert bring(platform.library, uploaded, own).name == "checkpoint-3"


async def test_a_store_that_refuses_does_not_end_the_run(
    machine: Callable[[str], Platform], harbour: Path, small_base: Path, tmp_path: Path
) -> None:
    platform = machine("one")
    assert platform.job_metrics
    platform.job_metrics.accept(**job_metrics(platform.registry))
    dataset = await published(platform, harbour)
    # A file where the folder of checkpoints belongs: nothing can be written there.
    (tmp_path / "store" / "checkpoints").write_text("in the way")
    _, result, notes = await finished(platform, await submit(platform, request(dataset, small_base, "lone", epochs=1)))
    assert result.steps == 6
    refused = notes.count("CHECKPOINT_NOT_PUBLISHED")
    counted = platform.registry.get_sample_value("loraline_trainer_checkpoints_total", {"result": "unpublished"})
    assert counted == refused > 0, "the alert CheckpointFailures waits for it"
