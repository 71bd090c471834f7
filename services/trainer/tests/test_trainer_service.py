"""The service on a real queue and store; jobs run in their own processes where a test says so."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.evidence.receipt import load_receipt
from loraline.core.jobs.runner import JobRunner
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.core.testing.waiting import until_state
from loraline.trainer.config import TrainerSettings
from loraline.trainer.servicer import CREATE_TINY_MODEL, IMPORT_MODEL, TRAIN, TrainerServicer
from loraline.trainer.testing import chat, harbour_rows, write_rows

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
NO_CONTEXT: Any = None


@pytest.fixture
async def platform(tmp_path: Path, small_base: Path) -> AsyncIterator[Platform]:
    opened = open_platform(CoreSettings(data_dir=tmp_path / "data", allowed_paths=[small_base.parent], auth="off"))
    yield opened
    opened.database.close()


@pytest.fixture
def service(platform: Platform) -> TrainerServicer:
    return TrainerServicer(platform, TrainerSettings())


@pytest.fixture
async def dataset(platform: Platform, harbour: Path) -> ap.ArtifactRef:
    return (await asyncio.to_thread(platform.library.publish, ap.ARTIFACT_KIND_DATASET, "harbour", harbour)).ref


def train(dataset: ap.ArtifactRef, base: Path, **fields: Any) -> pb.TrainRequest:
    latest = ap.ArtifactRef(kind=dataset.kind, name=dataset.name)
    return pb.TrainRequest(
        name="mareva", base_model=pb.BaseModel(path=str(base)), datasets=[pb.WeightedDataset(ref=latest)], **fields
    )


async def refused(awaitable: Any) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        await awaitable
    return caught.value


async def test_a_run_is_queued_with_exact_inputs_and_defaults(
    service: TrainerServicer, dataset: ap.ArtifactRef, small_base: Path
) -> None:
    job = (await service.Train(train(dataset, small_base, request_id="r1"), NO_CONTEXT)).job
    spec = pb.TrainRequest()
    assert job.spec.Unpack(spec)
    assert spec.datasets[0].ref == dataset
    assert dataset.digest
    assert spec.parameters.lora.r == 16
    assert list(job.inputs) == [dataset]
    assert job.labels["run"] == "mareva"
    again = (await service.Train(train(dataset, small_base, request_id="r1"), NO_CONTEXT)).job
    assert again.name == job.name
    other = train(dataset, small_base, request_id="r1", validation_fraction=0.5)
    assert (await refused(service.Train(other, NO_CONTEXT))).reason == "REQUEST_ID_REUSED"
    assert (await refused(service.Train(train(dataset, small_base), NO_CONTEXT))).reason == "RUN_EXISTS"
    run = (await service.GetRun(pb.GetRunRequest(name="mareva"), NO_CONTEXT)).run
    assert (run.job, run.state) == (job.name, job_pb2.JOB_STATE_QUEUED)
    assert [run.name for run in (await service.ListRuns(pb.ListRunsRequest(), NO_CONTEXT)).runs] == ["mareva"]


async def test_one_name_is_given_once_however_many_ask(
    service: TrainerServicer, dataset: ap.ArtifactRef, small_base: Path
) -> None:
    calls = [service.Train(train(dataset, small_base), NO_CONTEXT) for _ in range(8)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(answer, Exception) for answer in answers) == 1


async def test_refusals_at_submit(
    service: TrainerServicer, dataset: ap.ArtifactRef, small_base: Path, tmp_path: Path
) -> None:
    contract = train(dataset, small_base, serving_contract=pb.ServingContract(max_lora_rank=8))
    assert (await refused(service.Train(contract, NO_CONTEXT))).reason == "NOT_SERVABLE"
    outside = train(dataset, tmp_path)
    assert (await refused(service.Train(outside, NO_CONTEXT))).reason == "PATH_NOT_ALLOWED"
    missing = train(dataset, small_base.parent / "nowhere")
    assert (await refused(service.Train(missing, NO_CONTEXT))).reason == "MODEL_PATH_MISSING"
    no_model = train(dataset, small_base)
    no_model.base_model.artifact.CopyFrom(dataset)
    assert (await refused(service.Train(no_model, NO_CONTEXT))).reason == "NOT_A_MODEL"
    assert (await refused(service.GetRun(pb.GetRunRequest(name="nobody"), NO_CONTEXT))).reason == "RUN_MISSING"
    small = pb.CreateTinyModelRequest(vocab_size=100)
    assert (await refused(service.CreateTinyModel(small, NO_CONTEXT))).reason == "VOCABULARY_TOO_SMALL"


async def test_a_plan_counts_and_warns(service: TrainerServicer, dataset: ap.ArtifactRef, small_base: Path) -> None:
    asked = train(dataset, small_base, parameters=pb.TrainingParameters(epochs=2, batch_size=5))
    plan = await service.PlanRun(pb.PlanRunRequest(run=asked), NO_CONTEXT)
    assert plan.ok
    assert plan.total_steps == 10
    assert plan.resolved.parameters.lora.alpha == 32
    assert plan.memory_bytes["weights_on_disk"] == (small_base / "model.safetensors").stat().st_size
    assert plan.memory_bytes["total"] > plan.memory_bytes["weights_on_disk"]
    hardware = [check for check in plan.checks if check.code in ("NO_GPU", "HARDWARE", "MEMORY")]
    assert len(hardware) == 1 and "GB" in hardware[0].message
    asked.serving_contract.vocab_size = 10
    refused_plan = await service.PlanRun(pb.PlanRunRequest(run=asked), NO_CONTEXT)
    assert not refused_plan.ok
    assert refused_plan.checks[0].code == "SERVING_CONTRACT"


async def run_job(platform: Platform, job: job_pb2.Job) -> job_pb2.Job:
    runner = JobRunner(platform.settings, platform.jobs.table, [TRAIN, IMPORT_MODEL, CREATE_TINY_MODEL])
    await runner.start()
    try:
        return await until_state(platform.jobs, job.name, ENDED, seconds=280)
    finally:
        await runner.drain()


@pytest.mark.slow
async def test_a_job_trains_and_publishes(
    service: TrainerServicer, platform: Platform, dataset: ap.ArtifactRef, small_base: Path
) -> None:
    parameters = pb.TrainingParameters(max_steps=4, learning_rate=5e-3, batch_size=8, lora=pb.LoraParameters(r=4))
    job = (await service.Train(train(dataset, small_base, parameters=parameters), NO_CONTEXT)).job
    job = await run_job(platform, job)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    result = pb.TrainResult()
    assert job.result.Unpack(result)
    assert (result.steps, result.receipt.rows, result.receipt.rows_teaching_eos) == (4, 24, 24)
    assert [point.step for point in result.loss_curve] == [1, 2, 3, 4]
    assert result.probes.probes == 8
    assert result.probes.max_abs_logprob_shift > 1e-3
    assert result.HasField("eval_loss")
    assert {"loss", "token_accuracy", "tokens_per_second"} <= set(job.progress.metrics)
    artifact = platform.library.get(result.adapter)
    assert (artifact.job, list(artifact.inputs)) == (job.name, [dataset])
    assert artifact.facts["rank"] == 4
    folder = platform.library.fetch(result.adapter)
    assert load_receipt(folder).counts.rows == 24
    assert json.loads((folder / "base_model.json").read_text())["source"] == "path"
    run = (await service.GetRun(pb.GetRunRequest(name="mareva"), NO_CONTEXT)).run
    assert run.adapter == result.adapter
    assert run.checkpoints[0].step == 4
    assert [row.length for row in run.first_batch] == [row.length for row in result.first_batch] != []
    assert not result.HasField("continuation")


@pytest.mark.slow
async def test_a_continued_run_ends_as_one_that_never_stopped(
    service: TrainerServicer, platform: Platform, dataset: ap.ArtifactRef, small_base: Path
) -> None:
    """With a schedule that does not depend on the end, two epochs and two more are four, to the bit."""

    def asked(epochs: float, name: str, policy: int = 0) -> pb.TrainRequest:
        lora = pb.LoraParameters(r=4, dropout=0.1)
        parameters = pb.TrainingParameters(
            epochs=epochs, learning_rate=5e-3, batch_size=8, lora=lora, lr_scheduler="constant", warmup_ratio=0
        )
        request = train(dataset, small_base, parameters=parameters, existing_run=policy)
        request.name = name
        return request

    async def digest(request: pb.TrainRequest) -> tuple[str, pb.TrainResult, str]:
        job = await run_job(platform, (await service.Train(request, NO_CONTEXT)).job)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        result = pb.TrainResult()
        job.result.Unpack(result)
        weights = platform.library.fetch(result.adapter) / "adapter_model.safetensors"
        events = await platform.jobs.events(job.name)
        told = " ".join(event.note.message for event in events if event.note.reason == "RUN_CONTINUED")
        return hashlib.sha256(weights.read_bytes()).hexdigest(), result, told

    whole, _, _ = await digest(asked(4, "whole"))
    await digest(asked(2, "parts"))
    parts, result, told = await digest(asked(4, "parts", pb.EXISTING_RUN_POLICY_CONTINUE))
    assert parts == whole
    assert (result.resumed_from, result.steps, result.epochs) == ("checkpoint-6", 12, 4.0)
    assert "checkpoint-6" in told and "2.00 epochs remain" in told and "last loss" in told
    stood = result.continuation
    assert (stood.checkpoint, stood.epoch, stood.remaining_epochs) == ("checkpoint-6", 2.0, 2.0)
    assert stood.last_loss == next(point.loss for point in result.loss_curve if point.step == 6)
    again = await run_job(
        platform, (await service.Train(asked(4, "parts", pb.EXISTING_RUN_POLICY_CONTINUE), NO_CONTEXT)).job
    )
    error = LoralineError.from_status(again.error)
    assert (error.reason, "above 4" in error.message) == ("NOTHING_LEFT_TO_TRAIN", True)


@pytest.mark.slow
async def test_a_job_that_cannot_be_trained_says_which_row(
    service: TrainerServicer, platform: Platform, small_base: Path, tmp_path: Path
) -> None:
    rows = [*harbour_rows(3), {"messages": [{"role": "user", "content": "alone"}]}, chat("a", "b")]
    bad = platform.library.publish(ap.ARTIFACT_KIND_DATASET, "bad", write_rows(tmp_path / "bad", rows)).ref
    job = await run_job(platform, (await service.Train(train(bad, small_base), NO_CONTEXT)).job)
    assert job.state == job_pb2.JOB_STATE_FAILED
    error = LoralineError.from_status(job.error)
    assert error.reason == "DATASET_ROWS_INVALID"
    assert list(error.fields) == ["train.jsonl:4"]


@pytest.mark.slow
async def test_a_model_is_imported_without_pickles(
    service: TrainerServicer, platform: Platform, small_base: Path, tmp_path: Path
) -> None:
    import shutil

    source = small_base.parent / "with-pickle"
    shutil.copytree(small_base, source, dirs_exist_ok=True)
    (source / "training_args.bin").write_bytes(b"pickle")
    (source / "run_me.py").write_text("print('no')")
    request = pb.ImportModelRequest(name="brought", source=pb.BaseModel(path=str(source)))
    job = await run_job(platform, (await service.ImportModel(request, NO_CONTEXT)).job)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    result = pb.ModelResult()
    assert job.result.Unpack(result)
    names = {path.name for path in platform.library.fetch(result.model).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"training_args.bin", "run_me.py"}
    assert result.parameters == 448 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 + 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
