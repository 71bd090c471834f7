"""One whole run of ours, from the start of its process: what start-up, checkpoints and evidence take of its time.

Prints seconds as JSON. The base lies in a folder, the rows in a dataset, as in a job; ten checkpoints and two
evaluations are made, as by default. `--peer` runs TRL on the same folder and rows, as far as its first step.
"""

from __future__ import annotations

import time

BEGIN = time.perf_counter()

import argparse  # noqa: E402  (the process has begun; what follows is start-up)
import json  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def ours(folder: Path, work: Path, epochs: float) -> dict[str, float]:
    """Train, prove and complete an adapter; return where the time went."""
    from loraline.trainer.engines import preparing, sft, training
    from loraline.trainer.engines.encoding import ChatEncoder
    from loraline.trainer.engines.samples import SampleAnswers
    from loraline.trainer.testing_runs import Watcher, inputs, spec

    spent: dict[str, float] = defaultdict(float)

    class Timed(Watcher):
        """Keeps fractions of seconds, and when the first step was made."""

        def progress(self, *told: Any, **more: Any) -> None:
            """Note the first step."""
            spent["first_step"] = spent["first_step"] or time.perf_counter() - BEGIN
            super().progress(*told, **more)

        def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
            """Add up."""
            spent[name] += amount

    def timed(holder: Any, name: str, part: str) -> None:
        real: Callable[..., Any] = getattr(holder, name)

        def measured(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return real(*given, **named)
            finally:
                spent[part] += time.perf_counter() - begin

        setattr(holder, name, measured)

    timed(training, "prove", "probes")
    timed(training, "check_characters", "receipt")
    timed(ChatEncoder, "_prove", "receipt")
    timed(preparing, "receipt_of", "receipt")
    timed(sft, "data_position", "receipt")
    timed(sft, "show_first_batch", "first_batch")
    timed(SampleAnswers, "take", "samples")
    timed(SampleAnswers, "look_at_base", "samples")
    asked = spec(epochs=epochs, batch_size=8, max_length=256, save_steps=0, learning_rate=1e-4)
    finished = training.run(inputs(folder / "base", folder / "rows"), asked, work, Timed())
    assert finished is not None
    return {**spent, "train": finished.run.train_seconds, "all": time.perf_counter() - BEGIN}


def peer(folder: Path, work: Path) -> dict[str, float]:
    """Start TRL on the same folder and rows, nothing set but the batch; return when its first step was made."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    found: dict[str, float] = {}

    class First(TrainerCallback):
        """Ends the run after a step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Take the time."""
            found["first_step"] = time.perf_counter() - BEGIN
            control.should_training_stop = True

    trainer = SFTTrainer(
        model=str(folder / "base"),
        args=SFTConfig(
            output_dir=str(work), use_cpu=True, report_to="none", save_strategy="no", per_device_train_batch_size=8,
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "rows" / "train.jsonl"), split="train"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=AutoTokenizer.from_pretrained(str(folder / "base")),
        callbacks=[First()],
    )  # fmt: skip
    trainer.train()
    return found


def main() -> None:
    """Run one of both."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--epochs", type=float, default=3)
    arguments.add_argument("--peer", action="store_true")
    wanted = arguments.parse_args()
    print(
        json.dumps(peer(wanted.folder, wanted.work) if wanted.peer else ours(wanted.folder, wanted.work, wanted.epochs))
    )


if __name__ == "__main__":
    main()
