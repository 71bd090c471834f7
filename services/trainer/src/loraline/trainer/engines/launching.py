"""torchrun: one training on several processes of this machine, watched and spoken for by the job's own process.

The processes ("ranks") train; the job's process holds the database, the store and the job's lease. Rank 0 tells it what
happens and asks whether to stop, over a socket of this machine; every rank is connected, so that one that dies is
noticed at once. The job's process loads no weights.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

from loraline.core.errors import LoralineError, failed_precondition
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.memory import out_of_memory, tell, with_less_memory
from loraline.trainer.engines.rank_calls import RankCalls
from loraline.trainer.engines.training import FinishedRun, RunInputs
from loraline.trainer.spec import TrainingSpec

_LOOK_SECONDS = 0.2
_END_SECONDS = 20.0
"""How long ranks may take to end once they were asked to."""


@dataclass(frozen=True)
class RankTask:
    """What every rank reads before it begins."""

    inputs: RunInputs
    spec: TrainingSpec
    workdir: Path
    run: str
    address: str
    key: bytes


def run_on_ranks(
    inputs: RunInputs, spec: TrainingSpec, workdir: Path, observer: RunObserver, *, count: int = 0
) -> FinishedRun | None:
    """Train and prove on `count` processes, 0 for one on each GPU. None when the run was asked to stop.

    When memory runs out on any of them, all are started anew from the last checkpoint with smaller micro-batches and
    the same effective batch. Raises what a rank raised; INTERNAL (RANK_LOST) when one ended without a word;
    FAILED_PRECONDITION (NO_GPU_FOR_RANKS) without GPUs to count.
    """
    count = count or torch.cuda.device_count()
    if count == 0:
        message = (
            "LAUNCHER_TORCHRUN starts a process on each GPU, and there is none. Use LAUNCHER_PROCESS, or set "
            "LORALINE_TRAINER_RANKS to train with so many processes on the CPU."
        )
        raise failed_precondition("NO_GPU_FOR_RANKS", message)
    now = spec
    while True:
        calls = _train_once(inputs, now, workdir, observer, count)
        if calls.failure is not None:
            raise calls.failure
        if not calls.out_of_memory:
            return calls.finished
        smaller = with_less_memory(now)
        if smaller is None:
            raise out_of_memory(now)
        tell(now, smaller, observer)
        now = smaller


def _train_once(inputs: RunInputs, spec: TrainingSpec, workdir: Path, observer: RunObserver, count: int) -> RankCalls:
    folder = Path(tempfile.mkdtemp(prefix="loraline-ranks-"))  # short: the path of a socket has room for 107 bytes
    try:
        task = RankTask(inputs, spec, workdir, observer.run, str(folder / "socket"), secrets.token_bytes(32))
        (folder / "task.pickle").write_bytes(pickle.dumps(task))
        calls = RankCalls(task.address, task.key, observer)
        observer.note(f"torchrun starts {count} processes", reason="RANKS_STARTED")
        process = subprocess.Popen(_command(count, folder / "task.pickle"), env=_environment())
        try:
            _wait(process, calls, observer)
        finally:
            _end(process)
            calls.close()
        if process.returncode != 0 and not calls.stopped:
            calls.explain(_died(process.returncode))
        return calls
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _command(count: int, task: Path) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={count}", "--max-restarts=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
        "--module", "loraline.trainer.engines.rank_process", str(task),
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # Which card the machine's name resolves to is nobody's business: the ranks are all here.
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _wait(process: subprocess.Popen[bytes], calls: RankCalls, observer: RunObserver) -> None:
    """Return when torchrun has ended, or when it has to: the job was lost, or shall stop before the first step."""
    while process.poll() is None:
        time.sleep(_LOOK_SECONDS)
        if calls.broken.is_set():
            return
        if not calls.stepping.is_set() and observer.stop_cause:
            calls.stopped = True
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks; the kernel does where it cannot."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _died(code: int) -> LoralineError:
    message = (
        f"A process of the training ended without saying why (torchrun's exit code {code}); the others were ended "
        "with it. Look at the end of the job's log.txt. Where the machine ran out of memory, lower "
        "parameters.batch_size and raise parameters.grad_accum by as much; a lost GPU shows in `nvidia-smi`. "
        "existing_run CONTINUE goes on from the last checkpoint."
    )
    return LoralineError(grpc.StatusCode.INTERNAL, "RANK_LOST", message, metadata={"exit_code": str(code)})
