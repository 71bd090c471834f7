"""Jobs of other methods and launchers, in their own processes: what they publish, and that nothing outlives them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.evidence.receipt import load_receipt
from loraline.core.jobs.runner import JobRunner
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.core.testing.waiting import alive, until, until_state
from loraline.trainer.config import TrainerSettings
from loraline.trainer.servicer import TRAIN, TrainerServicer
from loraline.trainer.testing import harbour_pairs, write_rows

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
NO_CONTEXT: Any = None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]


@pytest.fixture
async def platform(tmp_path: Path, small_base: Path) -> AsyncIterator[Platform]:
    opened = open_platform(CoreSettings(data_dir=tmp_path / "data", allowed_paths=[small_base.parent], auth="off"))
    yield opened
    opened.database.close()


@pytest.fixture
def service(platform: Platform) -> TrainerServicer:
    return TrainerServicer(platform, TrainerSettings())


def train(dataset: ap.ArtifactRef, base: Path, **fields: Any) -> pb.TrainRequest:
    datasets = [pb.WeightedDataset(ref=ap.ArtifactRef(kind=dataset.kind, name=dataset.name))]
    return pb.TrainRequest(name="mareva", base_model=pb.BaseModel(path=str(base)), datasets=datasets, **fields)


async def test_all_weights_become_a_model_and_pairs_an_adapter(
    service: TrainerServicer, platform: Platform, harbour: Path, small_base: Path, tmp_path: Path
) -> None:
    rows = platform.library.publish(ap.ARTIFACT_KIND_DATASET, "harbour", harbour).ref
    pairs = platform.library.publish(
        ap.ARTIFACT_KIND_DATASET, "pairs", write_rows(tmp_path / "pairs", harbour_pairs(8))
    ).ref
    few = pb.TrainingParameters(max_steps=2, learning_rate=5e-3, batch_size=8)
    full = train(rows, small_base, method=pb.METHOD_FULL, parameters=few)
    preferred = train(pairs, small_base, objective=pb.OBJECTIVE_DPO, parameters=few)
    preferred.name = "preferred"
    plan = await service.PlanRun(pb.PlanRunRequest(run=preferred), NO_CONTEXT)
    assert plan.ok and plan.resolved.parameters.dpo_beta == 0.1
    runner = JobRunner(platform.settings, platform.jobs.table, [TRAIN])
    await runner.start()
    try:
        names = [(await service.Train(asked, NO_CONTEXT)).job.name for asked in (full, preferred)]
        jobs = [await until_state(platform.jobs, name, ENDED, seconds=280) for name in names]
    finally:
        await runner.drain()
    results = [pb.TrainResult(), pb.TrainResult()]
    for job, result in zip(jobs, results, strict=True):
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        assert job.result.Unpack(result)
    whole, tuned = results
    assert (whole.model.kind, whole.HasField("adapter")) == (ap.ARTIFACT_KIND_MODEL, False)
    facts = platform.library.get(whole.model).facts
    assert (facts["parameters"], facts["rows"], "rank" in facts) == (platform_weights(small_base), 24, False)
    assert load_receipt(platform.library.fetch(whole.model)).counts.rows == 24
    run = (await service.GetRun(pb.GetRunRequest(name="mareva"), NO_CONTEXT)).run
    assert (run.model, run.HasField("adapter")) == (whole.model, False)
    assert tuned.adapter.kind == ap.ARTIFACT_KIND_ADAPTER
    assert tuned.preference.rejected_receipt.rows == 8
    assert "rejected_receipt" in platform.library.get(tuned.adapter).facts


def platform_weights(folder: Path) -> int:
    from loraline.trainer.outcome import count_parameters

    return count_parameters(folder)


async def test_killed_and_cancelled_no_rank_outlives_its_job(
    service: TrainerServicer, platform: Platform, harbour: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALINE_TRAINER_RANKS", "2")
    rows = platform.library.publish(ap.ARTIFACT_KIND_DATASET, "harbour", harbour).ref
    long = pb.TrainingParameters(max_steps=100000, save_steps=2, batch_size=4, lora=pb.LoraParameters(r=4))
    asked = train(rows, small_base, launcher=pb.LAUNCHER_TORCHRUN, parameters=long)
    runner = JobRunner(platform.settings, platform.jobs.table, [TRAIN])
    await runner.start()
    try:
        name = (await service.Train(asked, NO_CONTEXT)).job.name
        first = await until_step(platform, name, 4)
        ranks = rank_processes()
        assert len(ranks) == 2
        os.kill(parent(parent(ranks[0])), signal.SIGKILL)
        await until(lambda: None if any(map(alive, ranks)) else True, "ranks to go with their job", 30)
        await until_step(platform, name, first + 4)
        ranks = rank_processes()
        assert len(ranks) == 2
        await platform.jobs.cancel(name)
        job = await until_state(platform.jobs, name, ENDED, seconds=120)
        assert job.state == job_pb2.JOB_STATE_CANCELLED
        await until(lambda: None if any(map(alive, ranks)) else True, "ranks to go with their job", 30)
    finally:
        await runner.drain()
    events = await platform.jobs.events(name)
    assert "RUN_RESUMED" in [event.note.reason for event in events]


async def until_step(platform: Platform, name: str, step: int) -> int:
    give_up = time.monotonic() + 300
    while (job := await platform.jobs.get(name)).progress.step < step:
        assert job.state not in ENDED, job.error
        assert time.monotonic() < give_up, f"{name} is at step {job.progress.step} of {step}"
        await asyncio.sleep(0.2)
    return job.progress.step


def rank_processes() -> list[int]:
    """Return the ranks below this process, whatever lies between."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"rank_process\0" in (folder / "cmdline").read_bytes():
                pid, above = int(folder.name), []
                while pid > 1:
                    pid = parent(pid)
                    above.append(pid)
                # torchrun's own command line names the module too; the ranks are below it
                if os.getpid() in above and b"torch.distributed.run" not in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
