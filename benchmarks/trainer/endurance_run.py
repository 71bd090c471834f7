"""One attempt of the run that endurance.py kills, stops and starves: trains in this process until something ends it.

It says on its output when it has come to the place asked for, and lingers there; what it was doing when SIGTERM came;
and how it failed. SIGTERM does here what it does in a job's process.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from loraline.core.jobs.endings import failure
from loraline.core.jobs.loading import StopSignal

PHASES = ("load", "step", "eval", "save")
STEPS, TEMPORARY, FAILED = 40, 75, 1
"""Steps of the run; exit status of a run that was stopped and has more to do (EX_TEMPFAIL), and of one that failed."""
LINGER = 0.3
"""Seconds to wait at the place asked for."""


class Phases:
    """Knows what the run is doing, and lingers once at the place asked for."""

    def __init__(self, wanted: str, number: int):
        self.wanted, self.number = wanted, number
        self.now, self.passed = "load", Counter[str]()

    def enter(self, name: str) -> None:
        """Begin a phase, or come by another place of it."""
        self.now = name
        self.passed[name] += 1
        if name == self.wanted and self.passed[name] == self.number:
            print(f"here {name}", flush=True)
            time.sleep(LINGER)

    def at(self, holder: Any, method: str, name: str) -> None:
        """Enter a phase whenever a method is called."""
        real = getattr(holder, method)

        def entered(*arguments: Any, **named: Any) -> Any:
            self.enter(name)
            return real(*arguments, **named)

        setattr(holder, method, entered)


def train(base: Path, rows: Path, work: Path, kill_at: int, phases: Phases) -> int:
    """Train to the end; return the exit status. Killed at a step, or stopped by SIGTERM."""
    stop = StopSignal()
    remember = stop.handler()

    def terminate(number: int, frame: FrameType | None) -> None:
        os.write(sys.stdout.fileno(), f"stopped in {phases.now}\n".encode())
        remember(number, frame)

    signal.signal(signal.SIGTERM, terminate)
    stop.loading.set()  # as jobs do, which have nothing to save while they import
    phases.enter("load")
    from loraline.trainer.engines import memory, training
    from loraline.trainer.engines.row_trainer import RowTrainer
    from loraline.trainer.testing_runs import Watcher, inputs, spec

    stop.loading.clear()
    phases.at(memory, "load_model", "load")
    phases.at(RowTrainer, "training_step", "step")
    phases.at(RowTrainer, "prediction_step", "eval")
    # In the middle of a save: the weights are written, and the optimizer's state is not.
    phases.at(RowTrainer, "_save_optimizer_and_scheduler", "save")

    class Ended(Watcher):
        """Dies at a step, or stops when asked."""

        def progress(self, step: int, total: int, eta_seconds: float, metrics: object) -> None:
            """Die here, before the step's checkpoint is written."""
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        @property
        def stop_cause(self) -> str:
            """What SIGTERM means to a job."""
            return "handover" if stop.terminated.is_set() else ""

    finished = training.run(inputs(base, rows), spec(max_steps=STEPS, save_steps=1, batch_size=4), work, Ended())
    return TEMPORARY if finished is None else 0


def main() -> int:
    """Run one attempt."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--kill-at", type=int, default=0)
    arguments.add_argument("--linger", default="", help="phase:number")
    wanted = arguments.parse_args()
    name, _, number = wanted.linger.partition(":")
    phases = Phases(name, int(number or 0))
    try:
        return train(wanted.folder / "base", wanted.folder / "rows", wanted.work, wanted.kill_at, phases)
    except Exception as error:
        print(f"failed {failure(error).reason} in {phases.now}", flush=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
