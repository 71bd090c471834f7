"""Memory that runs out elsewhere than in a training step: at load, in an evaluation, while probes are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import SFTTrainer

from loraline.core.errors import LoralineError
from loraline.core.evidence.probes import load_probes
from loraline.trainer import checkpoints
from loraline.trainer.engines import probing, proving, training
from loraline.trainer.engines.exhaustion import is_out_of_memory
from loraline.trainer.engines.loading import Precision
from loraline.trainer.engines.memory import base_too_large, out_of_memory
from loraline.trainer.hardware import Hardware
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, inputs, spec

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA driver error: out of memory"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", harbour_rows())
    return write_rows(folder, harbour_rows()[:12], "validation")


@pytest.mark.parametrize("error", SAID, ids=lambda error: type(error).__name__)
def test_libraries_say_it_in_many_words(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("loading failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("size mismatch for model.embed_tokens.weight"))
    assert not is_out_of_memory(OSError(2, "No such file or directory"))


@pytest.mark.parametrize("error", SAID[:2])
def test_a_base_that_does_not_fit_is_no_unreadable_one(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def too_large(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    watcher = Watcher()
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(small_base, dataset), spec(), tmp_path, watcher)
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert "QUANTIZATION_NF4" in caught.value.message
    assert watcher.counts["oom_recoveries"] == 0


def test_the_knobs_that_are_turned_already_are_left_out() -> None:
    told = out_of_memory(replace(spec(), batch_size=1, grad_accum=8)).message
    knobs = ["batch_size 1", "grad_accum 8", "max_length (now 128)", "QUANTIZATION_NF4", "lora.r (now 4)", "larger GPU"]
    assert sorted(knobs, key=told.index) == knobs
    assert "QUANTIZATION_NF4" not in out_of_memory(spec(), "nf4").message
    assert "batch_size and raise parameters.grad_accum" in out_of_memory(spec()).message
    assert "QUANTIZATION_NF4" not in base_too_large(Precision("bf16", "nf4", "")).message
    assert "METHOD_LORA" in base_too_large(Precision("bf16", "none", "", full=True)).message


@pytest.mark.slow
def test_an_evaluation_that_runs_out_of_memory_gets_smaller_batches(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SFTTrainer.prediction_step

    def prediction_step(self: Any, model: Any, batch: Any, *rest: Any, **more: Any) -> Any:
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, model, batch, *rest, **more)

    monkeypatch.setattr(SFTTrainer, "prediction_step", prediction_step)
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(batch_size=4, epochs=1), tmp_path, watcher)
    assert finished is not None
    assert finished.run.steps == 6
    assert watcher.counts["oom_recoveries"] == 1
    assert [entry["step"] for entry in finished.run.log if "eval_loss" in entry] == [6]


def short_of_memory_for(monkeypatch: pytest.MonkeyPatch, *types: torch.dtype) -> list[torch.dtype]:
    """Let probes in these types run out of memory; return the types that were tried, in order."""
    real, tried = probing.logprobs, []

    def logprobs(model: Any, *rest: Any) -> Any:
        if model.dtype not in tried:
            tried.append(model.dtype)
        if model.dtype in types:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB")
        return real(model, *rest)

    monkeypatch.setattr(probing, "logprobs", logprobs)
    return tried


@pytest.mark.slow
def test_probes_too_large_in_float32_are_measured_in_less(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory_for(monkeypatch, torch.float32)
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(learning_rate=2e-2), tmp_path, watcher)
    assert finished is not None
    assert tried == [torch.float32, torch.bfloat16]
    assert "PROBES_WITH_LESS_MEMORY" in watcher.notes
    probes = load_probes(finished.folder)
    assert probes.dtype == "bfloat16"
    assert probes.max_shift > 0.05


@pytest.mark.slow
def test_a_run_whose_probes_fit_nowhere_is_published_later(
    small_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        short_of_memory_for(patched, torch.float32, torch.bfloat16)
        with pytest.raises(LoralineError) as caught:
            training.run(inputs(small_base, dataset), spec(epochs=1), tmp_path, Watcher())
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert "CONTINUE" in caught.value.message
    assert checkpoints.newest_good(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "checkpoint-3"
    watcher = Watcher()
    finished = training.run(inputs(small_base, dataset), spec(epochs=1), tmp_path, watcher)
    assert finished is not None
    assert (watcher.steps, load_probes(finished.folder).dtype) == ([], "float32")


def test_a_small_gpu_is_not_asked_for_what_it_cannot_hold(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is made up here; what is tried on it, in which order, is decided from the sizes alone."""
    nf4, weights = Precision("bf16", "nf4", ""), proving.count_parameters(small_base)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def ways(gpu: int, memory: int) -> list[tuple[str, str, str]]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu * weights, gpu * weights))
        monkeypatch.setattr(proving, "look", lambda: Hardware(memory=memory * weights))
        found = proving.ways_of_measuring(small_base, nf4)
        return [(precision.dtype, precision.quantization, device) for precision, device in found]

    exact, by_cpu = ("fp32", "none", "cuda"), ("fp32", "none", "cpu")
    less = [("bf16", "none", "cuda"), ("bf16", "nf4", "cuda")]
    assert ways(gpu=6, memory=6) == [exact, by_cpu, *less]
    assert ways(gpu=3, memory=6) == [by_cpu, *less]
    assert ways(gpu=3, memory=3) == less
