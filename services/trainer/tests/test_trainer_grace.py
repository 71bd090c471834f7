"""SIGTERM in the middle of a training: the server ends within the grace that deployments give it, with a checkpoint."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.core.testing.waiting import until
from loraline.trainer import checkpoints
from loraline.trainer.config import TrainerSettings
from loraline.trainer.servicer import TrainerServicer
from loraline.trainer.testing import harbour_rows, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NO_CONTEXT: Any = None
GRACE = 60.0
"""Seconds, LORALINE_STOP_GRACE_SECONDS of the compose file; Kubernetes gives four times as much."""


@pytest.fixture
def platform(tmp_path: Path, small_base: Path) -> Iterator[Platform]:
    settings = CoreSettings(
        data_dir=tmp_path / "data", auth="off", allowed_paths=[small_base.parent], poll_seconds=0.05
    )
    opened = open_platform(settings)
    yield opened
    opened.database.close()


def server(platform: Platform) -> subprocess.Popen[bytes]:
    """Start the trainer as its image does."""
    settings = platform.settings
    given = {
        "LORALINE_DATA_DIR": str(settings.data_dir), "LORALINE_AUTH": "off", "LORALINE_LISTEN": "127.0.0.1:0",
        "LORALINE_METRICS_LISTEN": "", "LORALINE_POLL_SECONDS": "0.05", "LORALINE_STOP_GRACE_SECONDS": str(GRACE),
        "LORALINE_ALLOWED_PATHS": f'["{settings.allowed_paths[0]}"]',
    }  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LORALINE_")}
    return subprocess.Popen([sys.executable, "-m", "loraline.trainer"], env=clean | given)


async def test_sigterm_in_mid_run_ends_within_the_grace_with_a_checkpoint(
    platform: Platform, tmp_path: Path, small_base: Path, record_property: Any
) -> None:
    # No validation rows and a far save_steps: the checkpoint can only be that of the stop.
    rows = write_rows(tmp_path / "rows", harbour_rows())
    dataset = (await asyncio.to_thread(platform.library.publish, ap.ARTIFACT_KIND_DATASET, "harbour", rows)).ref
    parameters = pb.TrainingParameters(epochs=500, batch_size=4, lora=pb.LoraParameters(r=4), save_steps=100_000)
    request = pb.TrainRequest(
        name="lone", base_model=pb.BaseModel(path=str(small_base)), datasets=[pb.WeightedDataset(ref=dataset)],
        parameters=parameters,
    )  # fmt: skip
    job = (await TrainerServicer(platform, TrainerSettings()).Train(request, NO_CONTEXT)).job
    running = server(platform)
    try:
        await until(lambda: platform.jobs.table.get(job.name).progress.step >= 5, "some steps", seconds=150)
        told = platform.jobs.table.get(job.name).progress.step
        begin = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.wait, GRACE + 15) == 0
    finally:
        running.kill()
        running.wait()
    seconds = time.monotonic() - begin
    record_property("seconds_from_sigterm_to_end", round(seconds, 1))
    print(f"{seconds:.1f} s from SIGTERM to the end")
    assert seconds < GRACE, "then it would have been killed"
    assert platform.jobs.table.get(job.name).state == job_pb2.JOB_STATE_QUEUED, "another server goes on with it"
    (left,) = list((platform.settings.data_dir).rglob("checkpoint-*"))
    good, _ = checkpoints.newest_good(left.parent)
    assert good == left
    assert checkpoints.step_of(left) >= told
