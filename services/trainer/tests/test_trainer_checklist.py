"""The checklist before a run: hardware, bitsandbytes, and settings that mean nothing beside the others."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.serving.component import Platform
from loraline.core.serving.opening import open_platform
from loraline.trainer import planning
from loraline.trainer.config import TrainerSettings
from loraline.trainer.hardware import Hardware
from loraline.trainer.planning import plan
from loraline.trainer.testing import chat, harbour_rows, write_rows

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "vocab_size": 150_000,
    "max_position_embeddings": 512,
}


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    opened = open_platform(CoreSettings(data_dir=tmp_path / "data", allowed_paths=[tmp_path], auth="off"))
    yield opened
    opened.database.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that a plan takes for a base: it reads no weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}" * 1000)
    return folder


def checks(
    platform: Platform, base: Path, parameters: pb.TrainingParameters, *, validation: int = 0, fraction: float = 0.0
) -> dict[str, pb.PlanCheck]:
    """Return the checks of a plan by code; those with an error make it not ok."""
    rows = write_rows(platform.settings.data_dir / "rows", harbour_rows())
    if validation:
        write_rows(rows, [chat("Who goes?", f"Aye {number}") for number in range(validation)], "validation")
    dataset = platform.library.publish(ap.ARTIFACT_KIND_DATASET, "harbour", rows).ref
    request = pb.TrainRequest(
        name="mareva", base_model=pb.BaseModel(path=str(base)), parameters=parameters, validation_fraction=fraction
    )
    request.datasets.add(ref=dataset)
    answer = plan(request, platform, TrainerSettings(), [])
    found = {check.code: check for check in answer.checks}
    errors = [c for c in answer.checks if not c.passed and c.severity == job_pb2.SEVERITY_ERROR]
    assert answer.ok == (not errors)
    return found


@pytest.mark.parametrize(
    ("machine", "codes"),
    [
        (Hardware(memory=10**6), {"MEMORY", "NO_GPU"}),
        (Hardware(memory=10**13), {"NO_GPU"}),
        (Hardware(), {"NO_GPU"}),
        (Hardware("H100", 10**6, 1, 10**13), {"MEMORY"}),
        (Hardware("H100", 10**13, 1, 10**6), {"HARDWARE"}),
    ],
)
def test_a_missing_gpu_is_told_whatever_the_memory(
    platform: Platform, base: Path, monkeypatch: pytest.MonkeyPatch, machine: Hardware, codes: set[str]
) -> None:
    monkeypatch.setattr(planning, "look", lambda: machine)
    found = checks(platform, base, pb.TrainingParameters())
    told = {code: check for code, check in found.items() if code in ("NO_GPU", "HARDWARE", "MEMORY")}
    assert set(told) == codes
    assert all(check.passed == (code == "HARDWARE") for code, check in told.items())
    assert ("H100" in "".join(check.message for check in told.values())) == bool(machine.gpu)


@pytest.mark.parametrize("wish", [pb.QUANTIZATION_NF4, pb.QUANTIZATION_INT8, pb.QUANTIZATION_AUTO])
def test_a_quantisation_that_cannot_be_had_is_told_before_the_run(
    platform: Platform, base: Path, monkeypatch: pytest.MonkeyPatch, wish: pb.Quantization.ValueType
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    told = checks(platform, base, pb.TrainingParameters(quantization=wish)).get("PARAMETERS_QUANTIZATION_UNAVAILABLE")
    if wish == pb.QUANTIZATION_AUTO:
        assert told is None
    else:
        assert told is not None and "QUANTIZATION_NONE" in told.message and told.severity == job_pb2.SEVERITY_ERROR


@pytest.mark.parametrize(
    ("parameters", "validation", "fraction", "code"),
    [
        (pb.TrainingParameters(early_stopping_patience=2), 0, 0.0, "NOTHING_TO_EVALUATE"),
        (pb.TrainingParameters(eval_steps=5), 0, 0.0, "NOTHING_TO_EVALUATE"),
        (pb.TrainingParameters(), 3, 0.1, "VALIDATION_FRACTION_UNUSED"),
        (pb.TrainingParameters(save_steps=3, early_stopping_patience=2), 3, 0.0, "SAVE_STEPS_UNUSED"),
        (pb.TrainingParameters(max_truncated_share=0.5), 0, 0.0, "TRUNCATED_SHARE_UNUSED"),
        (pb.TrainingParameters(max_length=513), 0, 0.0, "MAX_LENGTH_ABOVE_MODEL"),
    ],
)
def test_settings_that_are_overridden_are_told(
    platform: Platform, base: Path, parameters: pb.TrainingParameters, validation: int, fraction: float, code: str
) -> None:
    check = checks(platform, base, parameters, validation=validation, fraction=fraction)[code]
    assert not check.passed and check.remedy
    refused = code == "NOTHING_TO_EVALUATE" and parameters.early_stopping_patience
    assert check.severity == (job_pb2.SEVERITY_ERROR if refused else job_pb2.SEVERITY_WARNING)


@pytest.mark.parametrize(
    ("parameters", "validation", "fraction"),
    [
        (pb.TrainingParameters(), 0, 0.0),
        (pb.TrainingParameters(early_stopping_patience=2, eval_steps=5), 0, 0.2),
        (pb.TrainingParameters(early_stopping_patience=2, eval_steps=5, save_steps=5, max_length=512), 3, 0.0),
        (pb.TrainingParameters(save_steps=3, eval_steps=5), 3, 0.0),
        (pb.TrainingParameters(max_truncated_share=0.5, length_policy=pb.LENGTH_POLICY_TRUNCATE), 0, 0.0),
    ],
)
def test_settings_that_count_are_not_told_of(
    platform: Platform, base: Path, parameters: pb.TrainingParameters, validation: int, fraction: float
) -> None:
    found = checks(platform, base, parameters, validation=validation, fraction=fraction)
    assert not [code for code in found if code.endswith(("_UNUSED", "_TO_EVALUATE", "_ABOVE_MODEL"))]


def test_a_blank_end_token_is_on_the_checklist(platform: Platform, base: Path) -> None:
    (base / "tokenizer_config.json").write_text('{"eos_token": " "}')
    told = checks(platform, base, pb.TrainingParameters())["BASE_MODEL_EOS_TOKEN_BLANK"]
    assert told.severity == job_pb2.SEVERITY_ERROR and "RepairModel" in told.message
