"""Training all weights: a model of its own, with the evidence that adapters have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.evidence.probes import compare_logprobs, load_probes
from loraline.core.evidence.receipt import load_receipt
from loraline.trainer.base_models import check_folder
from loraline.trainer.engines import training
from loraline.trainer.engines.loading import choose_precision
from loraline.trainer.memory_estimate import estimate
from loraline.trainer.testing import harbour_rows, make_base, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec

pytestmark = pytest.mark.slow
FULL: dict[str, Any] = {"method": pb.METHOD_FULL, "epochs": 3, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", harbour_rows())
    return write_rows(folder, harbour_rows()[:4], "validation")


@pytest.fixture(scope="module")
def whole(small_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> training.FinishedRun:
    finished = training.run(
        inputs(small_base, dataset), spec(**FULL), tmp_path_factory.mktemp("whole") / "w", Watcher()
    )
    assert finished is not None
    return finished


def test_a_model_with_its_evidence_comes_out(whole: training.FinishedRun, small_base: Path) -> None:
    from safetensors.torch import load_file

    folder = whole.folder
    check_folder(folder, "tuned")
    assert not (folder / "adapter_config.json").exists()
    assert {"token_receipt.json", "probes.json", "samples.json", "base_model.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert load_receipt(folder).counts.rows == 24
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "All weights of" in card
    before, after = load_file(small_base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in before if (before[name] != after[name]).any()]
    assert len(moved) == len(before)
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}
    losses = [entry["loss"] for entry in whole.run.log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    # The base is gone when the samples are taken; its answers were kept before the first step.
    assert all(sample.base != sample.adapter for sample in whole.last_samples)


def test_the_probes_tell_base_and_tuned_apart(whole: training.FinishedRun, small_base: Path) -> None:
    """Measured again with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    probes = load_probes(whole.folder)
    assert probes.max_shift > 0.05
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (small_base, whole.folder)]
    for probe in probes.probes:
        ids = torch.tensor([probe.prompt_ids + probe.response_ids])
        start = len(probe.prompt_ids)
        for model, told in zip(models, (probe.base_logprobs, probe.adapter_logprobs), strict=True):
            with torch.inference_mode():
                scores = torch.log_softmax(model(ids).logits[0].float(), -1)
            measured = [float(scores[start + at - 1, token]) for at, token in enumerate(probe.response_ids)]
            assert compare_logprobs(told, measured).max_abs < 1e-4


def test_paused_and_resumed_it_ends_the_same(
    whole: training.FinishedRun, small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    assert training.run(inputs(small_base, dataset), spec(**FULL), tmp_path, Watcher(stop_at=4)) is None
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(**FULL), tmp_path, watcher)
    assert finished is not None
    # An epoch is three steps: the wish is heard before the evaluation at its end.
    assert (finished.run.resumed_from, finished.run.steps) == ("checkpoint-3", 9)
    assert digest(finished.folder) == digest(whole.folder)
    assert finished.last_samples == whole.last_samples


def test_weights_are_kept_exact_while_they_are_trained_and_saved_like_the_base(tmp_path: Path) -> None:
    """A 16-bit base: steps smaller than 16 bits can show must add up, and the model must not double in size."""
    import torch
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    precision = choose_precision("bf16", "auto", base, full=True)
    assert (precision.torch_dtype, precision.saved_dtype) == (torch.float32, torch.bfloat16)
    rows = write_rows(tmp_path / "rows", harbour_rows(8))
    finished = training.run(
        inputs(base, rows), spec(**{**FULL, "epochs": 0, "max_steps": 2}), tmp_path / "work", Watcher()
    )
    assert finished is not None
    assert json.loads((finished.folder / "config.json").read_text())["dtype"] == "bfloat16"
    size = (base / "model.safetensors").stat().st_size
    assert (finished.folder / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.05)


def test_the_estimate_counts_all_weights(small_base: Path) -> None:
    config = json.loads((small_base / "config.json").read_text())
    size = (small_base / "model.safetensors").stat().st_size
    parts = estimate(config, size, spec(**FULL))
    assert (parts["base_weights"], parts["adapter"], parts["optimizer"]) == (size // 4 * 4, 0, size // 4 * 8)
