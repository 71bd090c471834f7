"""Weight type and quantisation by hardware: what is chosen where, and what is told when bitsandbytes fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraline.core.errors import LoralineError
from loraline.trainer.engines import training
from loraline.trainer.engines.loading import choose_precision
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

GPU = 24 * 10**9
Patch = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Let torch see a GPU, whose memory is that of the CPU in truth."""

    def see(*, gpu: bool, bf16: bool = True, free: int = GPU) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, GPU))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return see


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a million bytes of weights."""
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10**6)
    return tmp_path


@pytest.mark.parametrize(
    ("gpu", "bf16", "wish", "chosen"),
    [
        (True, True, "", "bf16"),
        (True, False, "", "fp16"),
        (True, False, "fp32", "fp32"),
        (False, True, "", "fp32"),
        (False, False, "", "fp32"),
        (False, False, "bf16", "bf16"),
    ],
)
def test_the_weight_type_is_the_hardwares(
    machine: Patch, base: Path, gpu: bool, bf16: bool, wish: str, chosen: str
) -> None:
    machine(gpu=gpu, bf16=bf16)
    assert choose_precision(wish, "none", base).dtype == chosen


def test_fp16_is_refused_without_a_gpu(machine: Patch, base: Path) -> None:
    machine(gpu=False)
    with pytest.raises(LoralineError) as caught:
        choose_precision("fp16", "none", base)
    assert caught.value.reason == "NOT_SUPPORTED" and "bf16" in caught.value.message


def test_auto_quantises_for_want_of_memory_alone(machine: Patch, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(gpu=True)
    assert choose_precision("", "auto", base).quantization == "none"
    machine(gpu=True, free=10**6)
    works(monkeypatch)
    tight = choose_precision("", "auto", base)
    assert (tight.quantization, tight.fallback) == ("nf4", "")
    machine(gpu=False, free=10**6)
    assert choose_precision("", "auto", base).quantization == "none"


def works(monkeypatch: pytest.MonkeyPatch, *, back: float = 1.0, broken: str = "") -> list[str]:
    """Let bitsandbytes give back `back` for ones, or fail; return the devices that it is asked on."""
    functional = pytest.importorskip("bitsandbytes").functional
    asked: list[str] = []
    made, ones = functional.quantize_4bit, torch.ones

    def quantize(weights: Any, **options: Any) -> Any:
        if broken:
            raise RuntimeError(broken)
        return made(weights * back, **options)

    def on_cpu(*shape: int, device: Any) -> torch.Tensor:
        asked.append(torch.device(device).type)
        return ones(*shape)

    monkeypatch.setattr(functional, "quantize_4bit", quantize)
    monkeypatch.setattr(torch, "ones", on_cpu)
    return asked


@pytest.mark.parametrize("gpu", [True, False])
def test_bitsandbytes_is_tried_on_the_device_that_trains(
    machine: Patch, base: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    machine(gpu=gpu)
    asked = works(monkeypatch)
    assert choose_precision("", "nf4", base).quantization == "nf4"
    assert asked == ["cuda" if gpu else "cpu"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            {"broken": "Error invalid device function at line 517"},
            "does not work on cuda here (RuntimeError: Error inv",
        ),
        ({"back": 0.5}, "gives back other weights"),
        (None, "is not installed"),
    ],
)
def test_broken_bitsandbytes_ends_a_wish_and_is_told_by_auto(
    machine: Patch, base: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any] | None, said: str
) -> None:
    machine(gpu=True, free=10**6)
    if fault is None:
        missing(monkeypatch)
    else:
        works(monkeypatch, **fault)
    for wish in ("nf4", "int8"):
        with pytest.raises(LoralineError) as caught:
            choose_precision("", wish, base)
        assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
        assert said in caught.value.message and "QUANTIZATION_NONE" in caught.value.message
    fallen_back = choose_precision("", "auto", base)
    assert fallen_back.quantization == "none"
    assert said in fallen_back.fallback and fallen_back.fallback in fallen_back.note


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )


@pytest.mark.slow
def test_a_run_that_falls_back_warns_and_counts(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is made as on a GPU that is short of memory; the run itself is on the CPU."""
    missing(monkeypatch)

    def choose(*wishes: Any, **more: Any) -> Any:
        with monkeypatch.context() as there:
            there.setattr(torch.cuda, "is_available", lambda: True)
            there.setattr(torch.cuda, "mem_get_info", lambda *_: (10, GPU))
            return choose_precision("fp32", *wishes[1:], **more)

    monkeypatch.setattr(training, "choose_precision", choose)
    watcher = Watcher()
    rows = write_rows(tmp_path / "rows", harbour_rows(8))
    finished = training.run(inputs(small_base, rows), spec(max_steps=2, max_length=600), tmp_path / "work", watcher)
    assert finished is not None
    assert "bitsandbytes is not installed" in finished.precision.note
    assert watcher.counts["quantization_fallbacks"] == 1
    assert "NOT_QUANTIZED" in watcher.notes
    # The base takes 256 tokens.
    assert "MAX_LENGTH_BOUNDED" in watcher.notes
