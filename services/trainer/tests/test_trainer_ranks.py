"""torchrun: two processes on the CPU train as one does; a lost one ends the run; stopping reaches all."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.trainer import checkpoints
from loraline.trainer.engines import launching, training
from loraline.trainer.testing import harbour_rows, write_rows
from loraline.trainer.testing_runs import Watcher, digest, inputs, spec

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
TOLERANCE = 1e-4
"""Relative difference of losses and weights that two processes may have from one: sums in another order."""


def asked(ranks: int, **fields: Any) -> Any:
    """The same effective batch of eight rows, whoever trains; no dropout, whose draws differ."""
    launcher = pb.LAUNCHER_TORCHRUN if ranks > 1 else pb.LAUNCHER_PROCESS
    lora = pb.LoraParameters(r=4)
    return spec(**{"batch_size": 8 // ranks, "launcher": launcher, "lora": lora, "epochs": 2, **fields})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("rows") / "harbour", harbour_rows())
    return write_rows(folder, harbour_rows()[:4], "validation")


def ranks_of(ancestor: int) -> dict[int, int]:
    """Return the processes that torchrun started below this one: rank -> process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or b"rank_process" not in (folder / "cmdline").read_bytes():
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
            rank = next((text[5:] for text in variables if text.startswith(b"RANK=")), b"")
            if rank and ancestor in ancestors(int(folder.name)):
                found[int(rank)] = int(folder.name)
        except (OSError, ValueError):
            continue
    return found


def ancestors(pid: int) -> list[int]:
    above = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        above.append(pid)
    return above


class Killing(Watcher):
    """Kills a rank at a step."""

    def progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        super().progress(step, total, eta_seconds, metrics)
        if step == 5:
            os.kill(ranks_of(os.getpid())[1], signal.SIGKILL)


@pytest.fixture(scope="module")
def two(
    small_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[training.FinishedRun, Watcher]:
    """An uninterrupted run of two processes."""
    watcher, work = Watcher(), tmp_path_factory.mktemp("two")
    finished = launching.run_on_ranks(inputs(small_base, dataset), asked(2), work, watcher, count=2)
    assert finished is not None
    return finished, watcher


@pytest.mark.slow
def test_two_processes_train_as_one(
    two: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    one = training.run(inputs(small_base, dataset), asked(1), tmp_path, Watcher())
    assert one is not None
    finished, watcher = two
    for name in ("loss", "eval_loss"):
        told = [[entry[name] for entry in done.run.log if name in entry] for done in (one, finished)]
        assert told[1] == pytest.approx(told[0], rel=TOLERANCE)
    weights = [load_file(done.folder / "adapter_model.safetensors") for done in (one, finished)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-3 for name in weights[0])
    assert (finished.run.steps, finished.run.tokens) == (one.run.steps, one.run.tokens)
    assert sorted(set(watcher.steps)) == list(range(1, 7))
    assert watcher.notes.count("TOKEN_RECEIPT") == 1  # one of them speaks
    assert not ranks_of(os.getpid())


@pytest.mark.slow
def test_paused_and_then_bereft_of_a_rank_the_run_still_ends_the_same(
    two: tuple[training.FinishedRun, Watcher], small_base: Path, dataset: Path, tmp_path: Path
) -> None:
    run = inputs(small_base, dataset)
    assert launching.run_on_ranks(run, asked(2), tmp_path, Watcher(stop_at=3), count=2) is None
    paused = tmp_path / "checkpoints" / "checkpoint-3"
    assert checkpoints.damage(paused) == ""
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in paused.iterdir()}
    with pytest.raises(LoralineError) as caught:
        launching.run_on_ranks(run, asked(2), tmp_path, Killing(), count=2)
    assert (caught.value.reason, caught.value.metadata["rank"]) == ("RANK_LOST", "1")
    assert not ranks_of(os.getpid())
    parts = launching.run_on_ranks(run, asked(2), tmp_path, Watcher(), count=2)
    assert parts is not None
    assert parts.run.resumed_from
    assert digest(parts.folder) == digest(two[0].folder)


@pytest.mark.slow
def test_what_a_rank_refuses_comes_back_typed(small_base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", harbour_rows(8))
    with pytest.raises(LoralineError) as caught:
        launching.run_on_ranks(inputs(small_base, rows), asked(2, max_length=8), tmp_path / "w", Watcher(), count=2)
    assert caught.value.reason == "ROWS_TOO_LONG"
    assert len(caught.value.fields) == 8


def test_a_wish_to_stop_while_they_load_ends_them_at_once(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    run = inputs(small_base, dataset)
    assert launching.run_on_ranks(run, asked(2), tmp_path, Watcher(stop_at=1, cause="cancel"), count=2) is None
    assert not ranks_of(os.getpid())
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_gpu_nobody_guesses_how_many(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU to count by")
    with pytest.raises(LoralineError) as caught:
        launching.run_on_ranks(inputs(small_base, dataset), asked(2), tmp_path, Watcher())
    assert caught.value.reason == "NO_GPU_FOR_RANKS"
    assert "LORALINE_TRAINER_RANKS" in caught.value.message


def test_out_of_memory_on_a_rank_starts_all_anew_with_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The ladder of the job's process; what a rank tells stands in for a full GPU."""
    tried = []

    def train_once(inputs: Any, spec: Any, *_: Any) -> Any:
        tried.append((spec.batch_size, spec.grad_accum, spec.gradient_checkpointing))
        return SimpleNamespace(failure=None, out_of_memory=len(tried) < room, finished="done")

    monkeypatch.setattr(launching, "_train_once", train_once)
    nothing: Any = None
    room = 4
    assert launching.run_on_ranks(nothing, asked(2), tmp_path, Watcher(), count=2) == "done"
    assert tried == [(4, 1, False), (2, 2, False), (1, 4, False), (1, 4, True)]
    room = 99
    with pytest.raises(LoralineError) as caught:
        launching.run_on_ranks(nothing, asked(2), tmp_path, Watcher(), count=2)
    assert caught.value.reason == "OUT_OF_MEMORY"


@pytest.mark.gpu
@pytest.mark.slow
def test_every_gpu_of_the_machine_trains(small_base: Path, dataset: Path, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    finished = launching.run_on_ranks(
        inputs(small_base, dataset), asked(2, batch_size=2, dtype="fp32"), tmp_path, Watcher()
    )
    assert finished is not None
    assert finished.run.steps == 2 * -(-24 // (2 * torch.cuda.device_count()))
