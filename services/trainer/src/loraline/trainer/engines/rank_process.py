"""One rank of a training that torchrun started: `python -m loraline.trainer.engines.rank_process TASK`."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_WAIT = timedelta(minutes=30)
"""How long ranks wait for each other: rank 0 evaluates, answers prompts and seals checkpoints alone."""


def main() -> int:
    """Train as the task says and return the exit code."""
    _die_with_parent()
    task_file = Path(sys.argv[1])
    import torch

    from loraline.core.errors import LoralineError
    from loraline.trainer.engines import training
    from loraline.trainer.engines.exhaustion import is_out_of_memory
    from loraline.trainer.engines.rank_calls import RankObserver

    # Our own file: the job's process wrote it a moment ago into a folder that only its user may read.
    task = pickle.loads(task_file.read_bytes())  # noqa: S301
    rank = int(os.environ["RANK"])
    observer = RankObserver(task.address, task.key, rank, task.run)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_WAIT)
    try:
        finished = training.run(task.inputs, task.spec, task.workdir, observer)
        if rank == 0:
            observer.call("finished", finished=finished)
        observer.call("part")
        return 0
    except LoralineError as error:
        observer.call("failed", error=error)
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            observer.call("out_of_memory")
        else:
            observer.call("crashed", text=f"rank {rank}: {type(error).__name__}: {error}")
    observer.call("part")
    # Others may wait for this one in the middle of a step; tearing down would wait for them.
    os._exit(1)


def _die_with_parent() -> None:
    """On Linux ask the kernel to end this process with torchrun, which puts it into a session of its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it went before the line above took effect
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
