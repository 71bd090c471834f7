"""The checklist before a run: what it says of Hub models, of data with weights, and of settings that look wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.trainer import hub_base
from loraline.trainer.config import TrainerSettings
from loraline.trainer.doubts import doubts
from loraline.trainer.planning import plan
from loraline.trainer.spec import training_spec
from loraline.trainer.testing import chat, harbour_rows, write_rows


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    opened = open_platform(CoreSettings(data_dir=tmp_path / "data", auth="off"))
    yield opened
    opened.database.close()


def test_a_model_that_is_not_here_is_told_before_the_run(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = write_rows(tmp_path / "rows", harbour_rows())
    extra = write_rows(tmp_path / "settings", [chat("Where is the key?", f"Under stone {n}.") for n in range(4)])
    refs = [
        platform.library.publish(ap.ARTIFACT_KIND_DATASET, name, folder).ref
        for name, folder in (("talk", rows), ("settings", extra))
    ]
    request = pb.TrainRequest(name="mareva", base_model=pb.BaseModel(hub_id="harbour/tiny"))
    request.datasets.add(ref=refs[0])
    request.datasets.add(ref=refs[1], weight=5)
    answer = plan(request, platform, TrainerSettings(), [])
    assert not answer.ok
    first = answer.checks[0]
    assert (first.code, first.severity) == ("BASE_MODEL_HUB_NOT_CACHED", job_pb2.SEVERITY_ERROR)
    assert "HF_HUB_OFFLINE" in first.message and str(tmp_path / "hub") in first.message
    said = next(check.message for check in answer.checks if check.code == "DATASETS")
    assert f"{len(harbour_rows()) + 20} an epoch" in said and "settings 4 rows × 5" in said
    with pytest.raises(LoralineError, match="HF_HUB_OFFLINE"):
        hub_base.check(request.base_model, timeout=1)


@pytest.mark.parametrize(
    ("parameters", "rows", "steps", "code"),
    [
        (pb.TrainingParameters(learning_rate=0.1), 1000, 300, "LEARNING_RATE_HIGH"),
        (pb.TrainingParameters(learning_rate=1e-8), 1000, 300, "LEARNING_RATE_LOW"),
        (pb.TrainingParameters(batch_size=64, grad_accum=64), 1000, 30, "BATCH_ABOVE_ROWS"),
        (pb.TrainingParameters(), 1000, 6, "FEW_STEPS"),
        (pb.TrainingParameters(), 100, 1000, "MANY_EPOCHS"),
        (pb.TrainingParameters(lora=pb.LoraParameters(r=512)), 40, 100, "RANK_ABOVE_ROWS"),
    ],
)
def test_settings_that_look_wrong_are_remarked_with_what_to_do(
    parameters: pb.TrainingParameters, rows: int, steps: int, code: str
) -> None:
    found = {check.code: check for check in doubts(training_spec(pb.TrainRequest(parameters=parameters)), rows, steps)}
    assert code in found and found[code].remedy and not found[code].passed
    assert all(check.severity == job_pb2.SEVERITY_WARNING for check in found.values())


def test_sound_settings_raise_no_doubt() -> None:
    assert list(doubts(training_spec(pb.TrainRequest()), 1000, 750)) == []
