"""Starting from another adapter, and what base and adapter answer on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER, ArtifactRef
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.trainer.base_models import ResolvedBase
from loraline.trainer.engines import training
from loraline.trainer.engines.samples import load_samples
from loraline.trainer.init_adapter import adapter_settings, check_base, with_its_settings
from loraline.trainer.testing import harbour_rows, make_base, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", harbour_rows())
    return write_rows(folder, harbour_rows()[:4], "validation")


@pytest.fixture(scope="module")
def first(small_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> training.FinishedRun:
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path_factory.mktemp("first"), Watcher())
    assert finished is not None
    return finished


def request(**fields: Any) -> pb.TrainRequest:
    fields.setdefault("init_adapter", ArtifactRef(kind=ARTIFACT_KIND_ADAPTER, name="harbour", version=1))
    return pb.TrainRequest(name="next", **fields)


def from_adapter(base: Path, dataset: Path, adapter: Path) -> training.RunInputs:
    plain = inputs(base, dataset)
    return training.RunInputs(
        "next", plain.base, plain.datasets, 0.0, plain.dataset_names, adapter, "adapter/harbour:v1", ["Who sails?"]
    )


def test_a_run_goes_on_from_a_finished_adapter(
    first: training.FinishedRun, small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    warm = from_adapter(small_base, dataset, first.folder)
    # A learning rate that changes next to nothing: what comes out is what went in.
    still = training.run(warm, spec(max_steps=1, learning_rate=1e-9), tmp_path / "still", Watcher())
    assert still is not None
    assert still.run.log[0]["loss"] == pytest.approx(first.figures["loss"], abs=0.3)
    assert still.run.log[0]["loss"] < 0.7 * first.run.log[0]["loss"]
    moved = training.run(warm, spec(epochs=2), tmp_path / "moved", Watcher())
    assert moved is not None
    assert moved.figures["loss"] < first.figures["loss"]
    assert digest(moved.folder) != digest(first.folder)
    assert "adapter/harbour:v1" in (moved.folder / "README.md").read_text()


def test_a_warm_start_that_was_paused_goes_on_the_same(
    first: training.FinishedRun, small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    warm = from_adapter(small_base, dataset, first.folder)
    whole = training.run(warm, spec(epochs=2), tmp_path / "whole", Watcher())
    assert training.run(warm, spec(epochs=2), tmp_path / "parts", Watcher(stop_at=3)) is None
    parts = training.run(warm, spec(epochs=2), tmp_path / "parts", Watcher())
    assert whole is not None and parts is not None
    assert digest(parts.folder) == digest(whole.folder)
    assert parts.samples == whole.samples


def test_the_adapters_settings_become_the_runs(first: training.FinishedRun) -> None:
    settings = adapter_settings(first.folder)
    filled = with_its_settings(request(), settings)
    assert (filled.method, filled.parameters.lora.r, filled.parameters.lora.alpha) == (pb.METHOD_LORA, 4, 8)
    assert list(filled.parameters.lora.target_modules) == sorted(settings["target_modules"])
    named = pb.TrainingParameters(lora=pb.LoraParameters(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(LoralineError) as caught:
        with_its_settings(request(parameters=named, method=pb.METHOD_DORA), settings)
    assert set(caught.value.fields) == {"parameters.lora.target_modules", "method"}
    with pytest.raises(LoralineError) as caught:
        with_its_settings(request(existing_run=pb.EXISTING_RUN_POLICY_CONTINUE), settings)
    assert caught.value.reason == "INIT_ADAPTER_DIFFERS"


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "PROMPT_TUNING", "r": 4}', '{"peft_type": "LORA"}'])
def test_what_is_no_lora_adapter_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(LoralineError) as caught:
        adapter_settings(tmp_path)
    assert caught.value.reason == "INIT_ADAPTER_UNREADABLE"


def test_an_adapter_of_another_base_is_refused(first: training.FinishedRun, small_base: Path, tmp_path: Path) -> None:
    check_base(first.folder, ResolvedBase(small_base, pb.BaseModel(path=str(small_base)), False))
    other = make_base(tmp_path / "other", layers=3)
    with pytest.raises(LoralineError) as caught:
        check_base(first.folder, ResolvedBase(other, pb.BaseModel(path=str(other)), False))
    assert caught.value.reason == "INIT_ADAPTER_OF_ANOTHER_BASE"
    assert "config_sha256" in caught.value.message
    with pytest.raises(LoralineError) as caught:
        check_base(tmp_path, ResolvedBase(other, pb.BaseModel(path=str(other)), False))
    assert caught.value.reason == "INIT_ADAPTER_UNREADABLE"


def test_base_and_adapter_answer_at_each_evaluation_and_at_the_end(first: training.FinishedRun) -> None:
    evaluated = {entry["step"] for entry in first.run.log if "eval_loss" in entry}
    samples = load_samples(first.folder / "samples.json")
    assert samples == first.samples
    assert {sample.step for sample in samples} == evaluated == {3, 6, 9, 12}
    last = first.last_samples
    assert [sample.origin for sample in last] == ["on_topic", "on_topic", "held_out", "held_out"]
    assert all(sample.step == 12 and sample.prompt and sample.reference for sample in last)
    # It learned to answer like the rows; the untrained base did not.
    assert any(sample.adapter.startswith("Aye") for sample in last)
    assert not any(sample.base.startswith("Aye") for sample in last)
    assert "| on topic |" in (first.folder / "README.md").read_text()


def test_asked_prompts_come_first_and_a_torn_file_is_no_matter(
    first: training.FinishedRun, small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "samples.json").write_text('{"samples": [{"pro')
    watcher = Watcher()
    finished = training.run(
        from_adapter(small_base, dataset, first.folder), spec(max_steps=2, eval_steps=1), tmp_path, watcher
    )
    assert finished is not None
    assert (finished.last_samples[0].prompt, finished.last_samples[0].origin) == ("Who sails?", "asked")
    assert {sample.step for sample in finished.samples} == {1, 2}
    assert "SAMPLE" in watcher.notes
    assert json.loads((tmp_path / "samples.json").read_text())["version"] == 1
