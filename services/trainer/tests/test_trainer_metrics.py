"""Every metric of a training, read from a server's registry while a real job runs, and after its end."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.serving.live import FIGURES
from loraline.core.serving.opening import make_runners, open_platform
from loraline.trainer.component import build
from loraline.trainer.config import TrainerSettings
from loraline.trainer.diagnosis.subject import diagnose, from_jobs
from loraline.trainer.metrics import VERDICTS, verdict_name
from loraline.trainer.servicer import TrainerServicer

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
SERIES = re.compile(r'^(loraline_training_\w+)\{base_model="[^"]+",run="mareva"\} (\S+)$', re.MULTILINE)


def counters(text: str) -> dict[str, float]:
    """Return the trainer's counters, each with its labels."""
    return {
        name: float(value)
        for name, value in re.findall(r"^loraline_trainer_(\w+_total(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
    }


@pytest.mark.slow
async def test_figures_are_there_while_a_run_lives_and_counters_stay(
    tmp_path: Path, small_base: Path, harbour: Path
) -> None:
    settings = CoreSettings(data_dir=tmp_path / "data", allowed_paths=[small_base.parent], auth="off", poll_seconds=0.1)
    platform = open_platform(settings)
    runners = make_runners(platform, [build(platform)])
    dataset = await asyncio.to_thread(platform.library.publish, ap.ARTIFACT_KIND_DATASET, "harbour", harbour)
    before = counters(generate_latest(platform.registry).decode())
    assert all(before[f'runs_total{{verdict="{verdict}"}}'] == 0 for verdict in VERDICTS)
    parameters = pb.TrainingParameters(
        max_steps=6, learning_rate=5e-3, batch_size=8, save_steps=2, eval_steps=2, lora=pb.LoraParameters(r=4)
    )
    request = pb.TrainRequest(name="mareva", base_model=pb.BaseModel(path=str(small_base)), parameters=parameters)
    request.datasets.add(ref=dataset.ref)
    seen: dict[str, float] = {}
    for runner in runners:
        await runner.start()
    try:
        job = (await TrainerServicer(platform, TrainerSettings()).Train(request, None)).job  # type: ignore[arg-type]
        for _ in range(2500):
            seen |= {name: float(value) for name, value in SERIES.findall(generate_latest(platform.registry).decode())}
            job = await platform.jobs.get(job.name)
            if job.state in ENDED:
                break
            await asyncio.sleep(0.1)
        text = generate_latest(platform.registry).decode()
        for _ in range(100):  # What a job counted last arrives a moment after its end.
            if any(value for name, value in counters(text).items() if name.startswith("runs_total")):
                break
            await asyncio.sleep(0.1)
            text = generate_latest(platform.registry).decode()
        subject = from_jobs("mareva", [job], settings.data_dir)
    finally:
        for runner in runners:
            await runner.drain()
        platform.database.close()
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    on_a_gpu = {"gpu_memory_bytes"}
    of_pairs = {figure for figure in FIGURES if figure.startswith("reward")}
    wanted = {f"loraline_training_{FIGURES[figure][0]}" for figure in FIGURES if figure not in on_a_gpu | of_pairs}
    wanted |= {f"loraline_training_{name}" for name in ("steps", "steps_planned", "progress_ratio")}
    assert wanted <= set(seen), wanted - set(seen)
    assert (seen["loraline_training_steps"], seen["loraline_training_steps_planned"]) == (6, 6)
    for name in ("loss", "eval_loss", "grad_norm", "tokens_per_second", "samples_per_second", "step_seconds", "epochs"):
        assert seen[f"loraline_training_{name}"] > 0, name
    # The run is over: no series of its name is left.
    assert "mareva" not in text and "loraline_training_" not in text
    after = counters(text)
    assert after["steps_total"] == 6
    assert after['checkpoints_total{result="saved"}'] == 3
    assert after["checkpoint_seconds_total"] > 0
    assert after["checkpoint_bytes_total"] > 10_000
    assert after["oom_recoveries_total"] == 0
    # The verdict that is counted is the one that Diagnose gives.
    said = {verdict: after[f'runs_total{{verdict="{verdict}"}}'] for verdict in VERDICTS}
    assert said == {verdict: float(verdict == verdict_name(diagnose(subject).verdict)) for verdict in VERDICTS}
