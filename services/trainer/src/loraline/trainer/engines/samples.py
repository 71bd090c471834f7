"""What base and adapter answer to the same prompts, at each evaluation and at the end: loss in words."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraline.trainer.engines import ranks
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow, Messages
from loraline.trainer.engines.probing import greedy

FILE_NAME = "samples.json"
MAX_TOKENS = 48
_OF_EACH = 2
_SHOWN = 60


@dataclass(frozen=True)
class Sample:
    """A prompt with both answers; `origin` is `asked`, `on_topic` or `held_out`, `reference` what the row says."""

    prompt: str
    origin: str
    reference: str = ""
    step: int = 0
    base: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class SamplePrompt:
    """What is asked, as messages."""

    messages: Messages
    sample: Sample


def sample_prompts(
    asked: Sequence[str], train: Sequence[EncodedRow], validation: Sequence[EncodedRow], *, seed: int
) -> list[SamplePrompt]:
    """Return the prompts of the request, two of the training rows and two of the validation rows, drawn by the seed."""
    prompts = [SamplePrompt([{"role": "user", "content": text}], Sample(text, "asked")) for text in asked]
    generator = random.Random(f"samples:{seed}")  # noqa: S311  (a draw, no secret)
    for origin, rows in (("on_topic", train), ("held_out", validation)):
        unique = list({row.source: row for row in rows}.values())
        for row in generator.sample(unique, min(_OF_EACH, len(unique))):
            last = max(at for at, message in enumerate(row.messages) if message["role"] == "assistant")
            if last > 0:
                sample = Sample(row.messages[last - 1]["content"], origin, row.messages[last]["content"])
                prompts.append(SamplePrompt(row.messages[:last], sample))
    return prompts


class SampleAnswers(TrainerCallback):
    """Answers the prompts at each evaluation and keeps the answers in samples.json beside the checkpoints."""

    def __init__(self, prompts: Sequence[SamplePrompt], encoder: ChatEncoder, file: Path, observer: RunObserver):
        self.prompts, self.encoder, self.file, self.observer = prompts, encoder, file, observer
        self.taken: list[Sample] = []
        self._base: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Keep what was answered up to the checkpoint that the run goes on from; answer what was cut short there."""
        step = state.global_step
        self.taken = [sample for sample in load_samples(self.file) if sample.step <= step]
        evaluated = any(entry.get("step") == step and "eval_loss" in entry for entry in state.log_history)
        if evaluated and not any(sample.step == step for sample in self.taken):
            self.take(model, step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Answer once more."""
        self.take(model, state.global_step)

    def look_at_base(self, model: Any) -> None:
        """Keep what the base answers where it will be gone: training all weights leaves none to switch off."""
        if ranks.first() and not hasattr(model, "disable_adapter"):
            with _answering(model):
                self._base = [self._answer(model, prompt) for prompt in self.prompts]

    def take(self, model: Any, step: int) -> list[Sample]:
        """Answer with base and adapter as they are now; an earlier answer at the same step is replaced.

        None are given once the run shall stop: whoever goes on answers.
        """
        if not ranks.first():
            return []
        with _answering(model):
            if self.prompts and not self._base:
                with model.disable_adapter():
                    self._base = self._answers(model)
            tuned = self._answers(model)
        if len(tuned) < len(self.prompts):
            return []
        new = [
            replace(prompt.sample, step=step, base=base, adapter=answer)
            for prompt, base, answer in zip(self.prompts, self._base, tuned, strict=True)
        ]
        self.taken = [sample for sample in self.taken if sample.step != step] + new
        content = {"version": 1, "samples": [asdict(sample) for sample in self.taken]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if new:
            told = f"at step {step}, to “{_short(new[0].prompt)}”: “{_short(new[0].adapter)}”"
            self.observer.note(told, reason="SAMPLE")
        return new

    def _answers(self, model: Any) -> list[str]:
        """Answer every prompt, or none when the run shall stop meanwhile."""
        found: list[str] = []
        for prompt in self.prompts:
            if self.observer.stop_cause:
                return []
            found.append(self._answer(model, prompt))
        return found

    def _answer(self, model: Any, prompt: SamplePrompt) -> str:
        ids = greedy(model, self.encoder.render(prompt.messages, prompt=True), self.encoder.eos_ids, MAX_TOKENS)
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def load_samples(file: Path) -> list[Sample]:
    """Return the answers kept so far; none when the file is missing or torn: they are made again."""
    try:
        return [Sample(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextmanager
def _answering(model: Any) -> Any:
    """Set the model up to answer, and leave it as it was: dropout, cache and random numbers."""
    training, cache = model.training, model.config.use_cache
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    model.eval()
    model.config.use_cache = True
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.config.use_cache = cache
        model.train(training)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
