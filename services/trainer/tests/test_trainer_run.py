"""Whole runs on a very small model: evidence, killing and resuming, pausing, refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.core.evidence.probes import compare_logprobs, load_probes
from loraline.core.evidence.receipt import compare_rendering, load_receipt
from loraline.trainer.engines import loading, training
from loraline.trainer.testing import chat, harbour_rows, make_base, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec

pytestmark = pytest.mark.slow


ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", harbour_rows())
    return write_rows(folder, harbour_rows()[:4], "validation")


@pytest.fixture(scope="module")
def whole(
    small_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[training.FinishedRun, Watcher]:
    """An uninterrupted run, for the others to compare with."""
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path_factory.mktemp("whole"), watcher)
    assert finished is not None
    return finished, watcher


def test_a_run_learns_and_reports(whole: tuple[training.FinishedRun, Watcher]) -> None:
    finished, watcher = whole
    assert finished.run.steps == 12
    assert finished.run.tokens == 4 * finished.receipt.counts.tokens
    losses = [entry["loss"] for entry in finished.run.log if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    names = {"loss", "token_accuracy", "tokens_per_second", "learning_rate", "grad_norm", "epoch", "eval_loss"}
    assert names <= set(watcher.metrics[-1])
    assert sorted(set(watcher.steps)) == list(range(1, 13))
    assert watcher.notes.index("TOKEN_RECEIPT") < watcher.notes.index("CHECKPOINT_SAVED")


def test_the_adapter_carries_its_evidence(
    whole: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path
) -> None:
    folder = whole[0].folder
    names = {path.name for path in folder.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
        "chat_template.jinja", "token_receipt.json", "probes.json", "base_model.json", "training_log.json",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert str(small_base) not in (folder / "adapter_config.json").read_text()
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"

    receipt = load_receipt(folder)
    assert (receipt.counts.rows, receipt.counts.rows_teaching_eos, len(receipt.rows)) == (24, 24, 16)
    tokenizer: Any = loading.load_tokenizer(folder)

    def render(messages: list[dict[str, str]]) -> list[int]:
        return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]

    assert compare_rendering(receipt, render) == []


def test_the_probes_can_be_measured_again(whole: tuple[training.FinishedRun, Watcher], small_base: Path) -> None:
    """With plain transformers and peft, as another stage would."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    probes = load_probes(whole[0].folder)
    assert probes.dtype == "float32"
    assert {"train-1", "validation-1", "fixed-en", "fixed-zh"} <= {probe.name for probe in probes.probes}
    assert probes.max_shift > 0.05
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), str(whole[0].folder)).eval()
    for probe in probes.probes:
        ids = torch.tensor([probe.prompt_ids + probe.response_ids])
        with torch.inference_mode():
            scores = torch.log_softmax(model(ids).logits[0].float(), -1)
        start = len(probe.prompt_ids)
        measured = [float(scores[start + at - 1, token]) for at, token in enumerate(probe.response_ids)]
        assert compare_logprobs(probe.adapter_logprobs, measured).max_abs < 1e-4
        assert compare_logprobs(probe.base_logprobs, measured).max_abs > 1e-3


KILLED = """
import os
from loraline.trainer.testing_runs import Watcher, inputs, spec, training
from pathlib import Path

class Killed(Watcher):
    def progress(self, step, total, eta_seconds, metrics):
        if step == {step}:
            os.kill(os.getpid(), 9)

training.run(inputs(Path({base!r}), Path({dataset!r})), spec(), Path({workdir!r}), Killed())
"""


def test_killed_in_the_middle_and_resumed_it_ends_the_same(
    whole: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    code = KILLED.format(step=8, base=str(small_base), dataset=str(dataset), workdir=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=280)
    assert killed.returncode == -9
    assert (tmp_path / "token_receipt.json").is_file()
    # What a kill in the middle of saving leaves behind: the newest checkpoint without its seal, cut short.
    torn = tmp_path / "checkpoints" / "checkpoint-7"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global')
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert finished is not None
    assert finished.run.resumed_from == "checkpoint-6"
    assert watcher.steps[0] == 7
    assert {"CHECKPOINT_TORN", "RUN_RESUMED"} <= set(watcher.notes)
    assert digest(finished.folder) == digest(whole[0].folder)
    assert (finished.run.tokens, finished.run.steps) == (whole[0].run.tokens, whole[0].run.steps)
    assert [entry["loss"] for entry in finished.run.log if "loss" in entry] == [
        entry["loss"] for entry in whole[0].run.log if "loss" in entry
    ]


@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_paused_between_checkpoints_it_goes_on_at_the_same_step(
    whole: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path, tmp_path: Path, stop_at: int
) -> None:
    assert training.run(inputs(small_base, dataset), spec(), tmp_path, Watcher(stop_at=stop_at)) is None
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert finished is not None
    assert finished.run.resumed_from == f"checkpoint-{stop_at}"
    assert digest(finished.folder) == digest(whole[0].folder)


def test_an_evaluation_left_out_by_a_hand_over_is_made_up_for(
    whole: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    """A hand-over at a step where an evaluation is due saves at once; whoever goes on evaluates first."""
    handed = Watcher(stop_at=6, cause="handover")
    assert training.run(inputs(small_base, dataset), spec(), tmp_path, handed) is None
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [3]
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert finished is not None
    logs = [[(e["step"], e["eval_loss"]) for e in run.log if "eval_loss" in e] for run in (finished.run, whole[0].run)]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == [3, 6, 9, 12]
    assert (watcher.steps[0], "eval_loss" in watcher.metrics[0]) == (6, True)
    assert digest(finished.folder) == digest(whole[0].folder)
    assert finished.samples == whole[0].samples


def test_a_finished_run_that_lost_its_end_trains_nothing_again(
    whole: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path
) -> None:
    workdir = whole[0].folder.parent
    before = digest(whole[0].folder)
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), workdir, watcher)
    assert finished is not None
    assert watcher.steps == []
    assert digest(finished.folder) == before
    assert finished.figures == whole[0].figures


def test_a_learning_rate_that_does_nothing_is_noticed(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, dataset), spec(max_steps=1, learning_rate=1e-12), tmp_path, Watcher())
    assert caught.value.reason == "ADAPTER_WITHOUT_EFFECT"


def test_a_loss_that_is_no_number_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(base, dataset), spec(), tmp_path / "work", Watcher())
    assert caught.value.reason == "LOSS_NOT_FINITE"


@pytest.mark.parametrize("quantization", [pb.QUANTIZATION_NF4, pb.QUANTIZATION_INT8])
def test_quantisation_that_is_asked_for_but_missing_is_refused(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, dataset), spec(quantization=quantization), tmp_path, Watcher())
    assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
    assert "QUANTIZATION_NONE" in caught.value.message
    assert loading.choose_precision("", "auto", small_base).quantization == "none"


def test_nf4_trains(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked = spec(quantization=pb.QUANTIZATION_NF4, max_steps=3)
    finished = training.run(inputs(small_base, dataset), asked, tmp_path, Watcher())
    assert finished is not None
    assert finished.precision.quantization == "nf4"
    assert load_probes(finished.folder).max_shift > 1e-3


def test_nf4_trains_where_its_blocks_of_64_do_not_fit_the_rows(dataset: Path, tmp_path: Path) -> None:
    """Widths of 96 and 192: blocks of 64 weights run across the rows of a matrix."""
    pytest.importorskip("bitsandbytes")
    base = make_base(tmp_path / "base", width=96)
    asked = spec(quantization=pb.QUANTIZATION_NF4, max_steps=4)
    finished = training.run(inputs(base, dataset), asked, tmp_path / "work", Watcher())
    assert finished is not None
    assert finished.precision.quantization == "nf4"
    losses = [entry["loss"] for entry in finished.run.log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert load_probes(finished.folder).max_shift > 1e-3


@pytest.mark.parametrize(
    "lora",
    [
        pb.LoraParameters(r=4, rslora=True),
        pb.LoraParameters(r=4, alpha=5.5, target_modules=["q_proj", "down_proj"]),
    ],
)
def test_kinds_of_lora(small_base: Path, dataset: Path, tmp_path: Path, lora: pb.LoraParameters) -> None:
    finished = training.run(inputs(small_base, dataset), spec(lora=lora, max_steps=3), tmp_path, Watcher())
    assert finished is not None
    config = json.loads((finished.folder / "adapter_config.json").read_text())
    assert config["use_rslora"] == lora.rslora
    assert config["lora_alpha"] == (lora.alpha or 8)
    # peft lists whole module paths for a small model and their last names for a large one.
    adapted = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert adapted == (set(lora.target_modules) or ALL_LINEAR)


def test_modules_that_the_base_lacks_are_named(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    asked = spec(lora=pb.LoraParameters(r=4, target_modules=["warp_drive"]))
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, dataset), asked, tmp_path, Watcher())
    assert caught.value.reason == "TARGET_MODULES_UNKNOWN"


def test_stopping_early_publishes_the_best_state(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    """The validation rows are four of the training rows with other answers: learning makes them worse."""
    from safetensors.torch import load_file

    other = [chat(row["messages"][0]["content"], "No, never.") for row in harbour_rows()[:4]]
    rows = write_rows(tmp_path / "rows" / "harbour", harbour_rows())
    write_rows(rows, other, "validation")
    asked = spec(epochs=12, early_stopping_patience=2, learning_rate=2e-2, keep_checkpoints=1)
    finished = training.run(inputs(small_base, rows), asked, tmp_path, Watcher())
    assert finished is not None
    evaluations = {entry["step"]: entry["eval_loss"] for entry in finished.run.log if "eval_loss" in entry}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert finished.run.steps == best + 2 * 3 < 36
    kept = load_file(tmp_path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    published = load_file(finished.folder / "adapter_model.safetensors")
    assert all((published[name] == kept[name]).all() for name in kept)


def test_stopping_early_needs_validation_rows(small_base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", harbour_rows())
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, rows), spec(early_stopping_patience=2), tmp_path, Watcher())
    assert caught.value.reason == "NOTHING_TO_EVALUATE"
    assert "validation_fraction" in caught.value.message


def short_of_memory(monkeypatch: pytest.MonkeyPatch, rows: int, at_step: int = 4) -> None:
    """Let a micro-batch of more rows than that run out of memory, from a step on."""
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

    real = SFTTrainer.training_step

    def training_step(self: Any, model: Any, batch: Any, *rest: Any) -> Any:
        if len(batch["input_ids"]) > rows and self.state.global_step >= at_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, model, batch, *rest)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)


def test_out_of_memory_the_run_goes_on_with_smaller_batches(
    whole: tuple[training.FinishedRun, Watcher],
    small_base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short_of_memory(monkeypatch, 2)
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert finished is not None
    assert (finished.run.steps, finished.run.tokens) == (whole[0].run.steps, whole[0].run.tokens)
    assert watcher.counts["oom_recoveries"] == 2
    assert watcher.notes.count("OUT_OF_MEMORY_RECOVERED") == 2
    assert "RESUME_RECEIPT" in watcher.notes
    # The same rows in the same steps: losses differ by the dropout's draws only.
    losses = [[entry["loss"] for entry in run.log if "loss" in entry] for run in (finished.run, whole[0].run)]
    assert losses[0][:3] == losses[1][:3]
    assert all(abs(one - other) < 0.35 for one, other in zip(*losses, strict=True))


def test_out_of_memory_down_the_whole_ladder_still_ends_well(
    whole: tuple[training.FinishedRun, Watcher],
    small_base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that suffices only for one row at a time with recomputed activations."""
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

    real, tried = SFTTrainer.training_step, []

    def training_step(self: Any, model: Any, batch: Any, *rest: Any) -> Any:
        settings = (len(batch["input_ids"]), self.args.gradient_accumulation_steps, self.args.gradient_checkpointing)
        if settings not in tried:
            tried.append(settings)
        if settings != (1, 8, True):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, model, batch, *rest)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert finished is not None
    assert tried == [(8, 1, False), (4, 2, False), (2, 4, False), (1, 8, False), (1, 8, True)]
    assert watcher.counts["oom_recoveries"] == 4
    assert (finished.run.steps, finished.run.tokens) == (whole[0].run.steps, whole[0].run.tokens)
    losses = [entry["loss"] for entry in finished.run.log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_out_of_memory_with_one_row_names_the_knobs(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 0, at_step=0)
    watcher = Watcher()
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert watcher.counts["oom_recoveries"] == 4
    knobs = ["max_length", "quantization", "lora.r", "larger GPU"]
    assert sorted(knobs, key=caught.value.message.index) == knobs


def test_a_lost_state_is_noticed_at_the_first_step(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a checkpoint are replaced by fresh ones, as if they had not been loaded."""
    from safetensors.torch import load_file, save_file

    from loraline.trainer import checkpoints

    asked = spec(learning_rate=2e-2, epochs=12)
    assert training.run(inputs(small_base, dataset), asked, tmp_path, Watcher(stop_at=30)) is None
    newest = tmp_path / "checkpoints" / "checkpoint-30"
    weights = load_file(newest / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, newest / "adapter_model.safetensors")
    checkpoints.seal(newest)
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, dataset), asked, tmp_path, Watcher())
    assert caught.value.reason == "RESUME_LOST_STATE"
