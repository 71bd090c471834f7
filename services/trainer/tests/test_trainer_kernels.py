"""Faster kernels: taken where they are there, told of where they are not, and the same loss either way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.engines import kernels, sft, training
from loraline.trainer.engines.arguments import training_arguments
from loraline.trainer.engines.kernels import Kernels, choose_kernels
from loraline.trainer.engines.loading import Precision, choose_precision, load_model
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

BF16 = Precision("bf16", "none", "")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU, and flash-attn."""
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)


class Model:
    """Takes an attention, declines it silently, or refuses it."""

    def __init__(self, attention: str = "", refusal: str = ""):
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.attention, self.refusal = attention, refusal

    def set_attn_implementation(self, name: str) -> None:
        if self.refusal:
            raise ValueError(self.refusal)
        self.config._attn_implementation = self.attention or name


def test_a_cpu_has_nothing_to_choose_from() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert choose_kernels(Model(), spec(), BF16) == Kernels()


@pytest.mark.usefixtures("gpu")
def test_what_is_installed_is_used_and_said() -> None:
    found = choose_kernels(Model(), spec(), BF16)
    assert found == Kernels(True, True, "flash attention, no padding; layers by Liger where it knows the model")
    assert found.padding_free
    pairs = choose_kernels(Model(), spec(objective=pb.OBJECTIVE_DPO), BF16)
    assert pairs.flash_attention and not pairs.liger  # its layers are not tried with pairs


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("model", "precision", "said"),
    [
        (Model(), Precision("fp32", "none", ""), "bf16 and fp16 alone"),
        (Model(), Precision("bf16", "none", "", full=True), "bf16 and fp16 alone"),
        (Model(refusal="Nutshell does not support Flash Attention 2 yet\nmore"), BF16, "Nutshell does not support"),
        (Model(attention="sdpa"), BF16, "the model takes no other"),
    ],
    ids=["fp32", "all weights", "refused", "declined"],
)
def test_what_cannot_be_used_is_said(model: Model, precision: Precision, said: str) -> None:
    found = choose_kernels(model, spec(), precision)
    assert not found.flash_attention and not found.padding_free
    assert said in found.note and "more" not in found.note


@pytest.mark.usefixtures("gpu")
def test_a_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALINE_TRAINER_FUSED_KERNELS", "0")
    found = choose_kernels(Model(), spec(), BF16)
    assert found == Kernels(note="attention by torch: LORALINE_TRAINER_FUSED_KERNELS is off")


def test_without_the_libraries_torch_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    assert choose_kernels(Model(), spec(), BF16) == Kernels(note="attention by torch: flash-attn is not installed")


def test_a_real_model_without_the_library_stays_as_it_was(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the library says yes, and loading it fails: torch's attention is what remains."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = load_model(small_base, choose_precision("bf16", "none", small_base))
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "is_flash_attn_2_available", lambda: True)
    before = model.config._attn_implementation
    found = choose_kernels(model, spec(), BF16)
    assert not found.flash_attention and found.note.startswith("attention by torch: ")
    assert model.config._attn_implementation == before


def test_liger_is_asked_of_the_trainer(tmp_path: Path) -> None:
    for liger in (False, True):
        made = training_arguments(24, spec(), BF16, tmp_path, run="harbour", evaluates=False, liger=liger)
        assert made.use_liger_kernel is liger


@pytest.mark.slow
def test_rows_end_to_end_have_the_loss_that_they_have_padded(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What flash attention turns on, by torch's attention: the same rows in the same steps, nothing between them."""
    rows = write_rows(tmp_path / "rows", harbour_rows())
    write_rows(rows, harbour_rows()[:4], "validation")
    asked: dict[str, Any] = {"max_steps": 4, "epochs": 0, "eval_steps": 4, "lora": pb.LoraParameters(r=4)}

    def losses(work: Path, watcher: Watcher) -> list[float]:
        finished = training.run(inputs(small_base, rows), spec(**asked), work, watcher)
        assert finished is not None
        return [entry["loss"] for entry in finished.run.log if "loss" in entry] + [finished.figures["eval_loss"]]

    padded = losses(tmp_path / "padded", Watcher())
    monkeypatch.setattr(sft, "choose_kernels", lambda *_: Kernels(flash_attention=True, note="flash"))
    watcher = Watcher()
    assert losses(tmp_path / "free", watcher) == pytest.approx(padded, rel=2e-4)
    assert "KERNELS" in watcher.notes


@pytest.mark.gpu
def test_on_a_gpu_they_give_the_losses_of_torch(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 rounds otherwise in each kernel: a hundredth apart is the same."""
    if not kernels.is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    rows = write_rows(tmp_path / "rows", harbour_rows())
    losses = []
    for switch in ("1", "0"):
        monkeypatch.setenv("LORALINE_TRAINER_FUSED_KERNELS", switch)
        asked = spec(max_steps=4, epochs=0, dtype="bf16", lora=pb.LoraParameters(r=4))
        finished = training.run(inputs(small_base, rows), asked, tmp_path / switch, Watcher())
        assert finished is not None
        losses.append([entry["loss"] for entry in finished.run.log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
