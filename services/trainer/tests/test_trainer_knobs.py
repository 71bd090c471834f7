"""Each setting of a run changes what it is for: a few real steps each, compared with the run without it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.evidence.probes import load_probes
from loraline.trainer.engines import training
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

pytestmark = pytest.mark.slow

RATE = 5e-3
PLAIN = pb.LoraParameters(r=4)


class Runs:
    """Runs on the same base, rows and seed; each in a folder of its own."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder = base, folder
        self.rows = write_rows(folder / "rows", harbour_rows(8))
        self.count = 0

    def train(self, steps: int = 3, adapter: Path | None = None, **fields: Any) -> training.FinishedRun:
        """Train `steps` steps of eight rows with these settings, on an earlier adapter where one is given."""
        self.count += 1
        fields = {"lora": PLAIN, "learning_rate": RATE, "lr_scheduler": "constant", **fields}
        asked = spec(max_steps=steps, save_steps=100, **fields)
        given = replace(inputs(self.base, self.rows), init_adapter=adapter)
        finished = training.run(given, asked, self.folder / str(self.count), Watcher())
        assert finished is not None
        return finished


@pytest.fixture(scope="module")
def runs(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(small_base, tmp_path_factory.mktemp("knobs"))


@pytest.fixture(scope="module")
def plain(runs: Runs) -> training.FinishedRun:
    """The run that the others are compared with."""
    return runs.train()


def losses(finished: training.FinishedRun) -> list[float]:
    return [entry["loss"] for entry in finished.run.log if "loss" in entry]


def rates(finished: training.FinishedRun) -> list[float]:
    return [entry["learning_rate"] / RATE for entry in finished.run.log if "loss" in entry]


def size(finished: training.FinishedRun, part: str) -> float:
    """Return the norm of the adapter's weights whose names have `part`."""
    weights = load_file(finished.folder / "adapter_model.safetensors")
    return math.sqrt(sum(float((tensor**2).sum()) for name, tensor in weights.items() if part in name))


def dropout_of(finished: training.FinishedRun) -> float:
    return json.loads((finished.folder / "adapter_config.json").read_text())["lora_dropout"]


SCHEDULES = {
    "linear": [0, 1, 2 / 3, 1 / 3],
    "polynomial": [0, 1, 2 / 3, 1 / 3],
    "constant_with_warmup": [0, 1, 1, 1],
    "inverse_sqrt": [0, 1, math.sqrt(1 / 2), math.sqrt(1 / 3)],
    "cosine_with_restarts": [0, 1, 3 / 4, 1 / 4],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_with_a_quarter_of_warm_up(runs: Runs, name: str) -> None:
    assert rates(runs.train(4, lr_scheduler=name, warmup_ratio=0.25)) == pytest.approx(SCHEDULES[name], abs=1e-4)


def test_weight_decay_makes_weights_smaller(runs: Runs, plain: training.FinishedRun) -> None:
    decayed = runs.train(weight_decay=20.0)
    # 1 - lr · decay is 0.9 a step; lora_A begins away from zero.
    assert size(decayed, "lora_A") == pytest.approx(0.9**3 * size(plain, "lora_A"), rel=0.05)
    assert losses(decayed)[0] == losses(plain)[0]


def test_clipping_holds_the_steps_back(runs: Runs, plain: training.FinishedRun) -> None:
    """AdamW divides the size of gradients out again, down to its epsilon of 1e-8."""
    clipped = runs.train(max_grad_norm=1e-7)
    assert size(clipped, "lora_B") < 0.5 * size(plain, "lora_B")
    norms = [entry["grad_norm"] for run in (clipped, plain) for entry in run.run.log[:1]]
    assert norms[0] == norms[1] > 0.01, "what is reported is the norm before clipping"


def test_noise_on_embeddings_is_there_in_training_alone(runs: Runs, plain: training.FinishedRun) -> None:
    noisy = runs.train(neftune_alpha=50.0)
    assert abs(losses(noisy)[0] - losses(plain)[0]) > 1e-3
    # Probes are measured without it: the base says the same of the same answers.
    said = [
        {tuple(probe.prompt_ids + probe.response_ids): probe.base_logprobs for probe in load_probes(run.folder).probes}
        for run in (noisy, plain)
    ]
    both = said[0].keys() & said[1].keys()
    assert both and all(said[0][ids] == said[1][ids] for ids in both)


def test_whole_modules_are_trained_and_saved(runs: Runs, plain: training.FinishedRun) -> None:
    saved = runs.train(lora=pb.LoraParameters(r=4, modules_to_save=["norm"]))
    base = load_file(runs.base / "model.safetensors")["model.norm.weight"]
    weights = load_file(saved.folder / "adapter_model.safetensors")
    trained = next(tensor for name, tensor in weights.items() if name.endswith("model.norm.weight"))
    assert float((trained - base).abs().max()) > RATE / 2
    assert not any("norm" in name for name in load_file(plain.folder / "adapter_model.safetensors"))


def test_bf16_computes_in_bf16(runs: Runs, plain: training.FinishedRun) -> None:
    half = runs.train(dtype="bf16")
    assert (half.precision.dtype, plain.precision.dtype) == ("bf16", "fp32")
    assert 1e-6 < abs(losses(half)[0] - losses(plain)[0]) < 0.05


def test_dora_trains_magnitudes(runs: Runs, plain: training.FinishedRun) -> None:
    dora = runs.train(method=pb.METHOD_DORA)
    assert json.loads((dora.folder / "adapter_config.json").read_text())["use_dora"] is True
    assert size(dora, "lora_magnitude_vector") > 0 == size(plain, "lora_magnitude_vector")
    assert losses(dora)[0] == pytest.approx(losses(plain)[0], abs=1e-3)
    assert losses(dora)[-1] < losses(dora)[0]
    assert load_probes(dora.folder).max_shift > 1e-3


def test_dropout_is_in_the_config_and_in_the_steps(runs: Runs, plain: training.FinishedRun) -> None:
    """The first step's loss is the base's whatever is dropped, for lora_B begins at zero."""
    dropped = runs.train(lora=pb.LoraParameters(r=4, dropout=0.5))
    assert [dropout_of(run) for run in (dropped, plain)] == [0.5, 0.0]
    assert losses(dropped)[0] == losses(plain)[0]
    assert all(abs(one - other) > 1e-4 for one, other in zip(losses(dropped)[1:], losses(plain)[1:], strict=True))


def test_dropout_goes_for_an_earlier_adapter_too(runs: Runs, plain: training.FinishedRun) -> None:
    """The run's setting counts, not the one that the adapter was trained with."""
    still = runs.train(adapter=plain.folder)
    dropped = runs.train(adapter=plain.folder, lora=pb.LoraParameters(r=4, dropout=0.5))
    assert [dropout_of(run) for run in (dropped, still)] == [0.5, 0.0]
    assert all(abs(one - other) > 1e-4 for one, other in zip(losses(dropped), losses(still), strict=True))
    again = runs.train(adapter=dropped.folder)
    assert dropout_of(again) == 0.0


def test_int8_trains(runs: Runs, plain: training.FinishedRun) -> None:
    pytest.importorskip("bitsandbytes")
    small = runs.train(quantization=pb.QUANTIZATION_INT8)
    assert small.precision.quantization == "int8"
    assert losses(small)[0] == pytest.approx(losses(plain)[0], abs=0.1)
    assert losses(small)[-1] < losses(small)[0]
    assert load_probes(small.folder).max_shift > 1e-3
