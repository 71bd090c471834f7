"""Sealed checkpoints: written by the trainer, brought to the disk and digested while the next steps run."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraline.trainer import checkpoints
from loraline.trainer.engines import ranks
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.data_position import DataPosition


class SealedCheckpoints(TrainerCallback):
    """Seals each checkpoint after it was written, then lets old ones go.

    Sealing waits for the disk and reads every file, in a thread of its own: training goes on meanwhile. A checkpoint
    counts once it is sealed; the next one waits for that, so that no more than one is ever on its way.
    """

    def __init__(self, observer: RunObserver, *, keep: int, position: DataPosition):
        self.observer, self.keep, self.position = observer, keep, position
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._under_way: tuple[Path, Future[None]] | None = None
        self._best: Path | None = None
        self._free_since = time.monotonic()

    def close(self) -> None:
        """Wait for what is under way, and tell of it where an error ended the training before the next step could.

        Whoever looks for checkpoints after this finds no half-sealed one.
        """
        self._thread.shutdown()
        with suppress(OSError):  # after an error of its own, which is the one to be told
            self._take()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take note of a checkpoint that was sealed meanwhile; raises what kept it from being sealed."""
        if self._under_way is not None and self._under_way[1].done():
            self._take_timed()
        self._free_since = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Whatever comes before this is no part of saving."""
        self._free_since = time.monotonic()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Have the best state so far saved, whatever save_steps says: rotation can only keep what there is."""
        loss = (metrics or {}).get("eval_loss", math.inf)
        cancelled = control.should_training_stop and not control.should_save
        if not cancelled and loss < (math.inf if state.best_metric is None else state.best_metric):
            control.should_save = True
        self._free_since = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to seal the checkpoint of this step, once every process has written its part."""
        ranks.wait_for_all()
        if not ranks.first():
            return
        self._take()
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.position.save(checkpoint)
        self._best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        self._under_way = checkpoint, self._thread.submit(checkpoints.seal, checkpoint)
        self.observer.count("checkpoint_seconds", time.monotonic() - self._free_since)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the last checkpoint."""
        self._take_timed()

    def _take_timed(self) -> None:
        begin = time.monotonic()
        self._take()
        self.observer.count("checkpoint_seconds", time.monotonic() - begin)

    def _take(self) -> None:
        """Wait for the checkpoint under way, if there is one, and tell of it."""
        if self._under_way is None:
            return
        (checkpoint, sealing), self._under_way = self._under_way, None
        sealing.result()
        self.observer.saved(checkpoint)
        checkpoints.rotate(checkpoint.parent, keep=self.keep, best=self._best)
        self.observer.count("checkpoints", result="saved")
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        self.observer.count("checkpoint_bytes", size)
        step = checkpoints.step_of(checkpoint)
        self.observer.note(f"checkpoint at step {step}", reason="CHECKPOINT_SAVED")
