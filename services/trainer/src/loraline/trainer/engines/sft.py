"""A training from its start or its last good checkpoint to weights on disk: answers, packs of them, or pairs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, set_seed

from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.trainer import checkpoints
from loraline.trainer.engines import ranks
from loraline.trainer.engines.arguments import evaluation_steps, training_arguments
from loraline.trainer.engines.callbacks import REWARDS, LiveProgress, RunObserver, Stopping
from loraline.trainer.engines.data_position import data_position
from loraline.trainer.engines.first_batch import show_first_batch
from loraline.trainer.engines.kernels import choose_kernels
from loraline.trainer.engines.loading import Precision, load_adapter
from loraline.trainer.engines.packing import Pack, pack, pack_collator, pack_dataset
from loraline.trainer.engines.pair_trainer import PairTrainer, pair_dataset
from loraline.trainer.engines.preparing import PreparedData
from loraline.trainer.engines.resuming import OverdueEvaluation, ResumeReceipt
from loraline.trainer.engines.row_trainer import RowTrainer, row_dataset
from loraline.trainer.engines.samples import SampleAnswers
from loraline.trainer.engines.sampling import EpochSampler
from loraline.trainer.engines.sealing import SealedCheckpoints
from loraline.trainer.spec import LoraSpec, TrainingSpec


@dataclass(frozen=True)
class TrainedRun:
    """How a run ended."""

    stopped: bool
    """Ended early because it was asked to; a checkpoint holds its state unless it was cancelled."""
    steps: int
    epochs: float
    tokens: int
    """Tokens seen in all, padding not counted."""
    train_seconds: float
    """Seconds of this process in the training loop."""
    log: list[dict[str, Any]]
    """transformers' log history over the whole run."""
    resumed_from: str
    """Name of the checkpoint that the run went on from; empty when it started anew."""


@dataclass(frozen=True)
class Start:
    """What a training begins with besides the base."""

    adapter: Path | None
    """Folder of the adapter to go on from; None for a fresh one."""
    samples: SampleAnswers
    batch_file: Path
    """Where to write what the model is shown first."""


@dataclass(frozen=True)
class _Shown:
    """What an epoch shows: rows, pairs, or packs of rows."""

    units: list[Any]
    lengths: list[int]
    """Tokens of each, by which those of like length share a batch."""


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    spec: TrainingSpec,
    precision: Precision,
    folder: Path,
    observer: RunObserver,
    target: Path,
    start: Start,
) -> TrainedRun:
    """Train, going on from the newest good checkpoint in `folder`, and save the adapter, or the model, to `target`.

    Raises FAILED_PRECONDITION (LOSS_NOT_FINITE, RESUME_LOST_STATE, NOTHING_TO_EVALUATE), INVALID_ARGUMENT for target
    modules that the base does not have; torch's error when memory runs out.
    """
    resume_from = _resume_point(folder, observer)
    set_seed(spec.seed)
    shown = _shown(data, spec)
    trainer, stopping, sealed = _build(model, tokenizer, data, shown, spec, precision, folder, observer, start)
    if resume_from is None or not start.batch_file.exists():
        show_first_batch(trainer, tokenizer, start.batch_file, observer)
    start.samples.look_at_base(trainer.model)
    begin = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        sealed.close()
    seconds = time.monotonic() - begin
    log = list(trainer.state.log_history)
    stopped = stopping.stopped
    if not stopped:
        start.samples.take(trainer.model, trainer.state.global_step)
        # The last step's checkpoint is there; whoever goes on from it answers and saves.
        stopped = bool(ranks.from_first(observer.stop_cause))
    if not stopped and ranks.first():
        _save(trainer.model, target, precision)
    return TrainedRun(
        stopped=stopped,
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        tokens=_tokens_seen(float(trainer.state.epoch or 0.0), shown.lengths, spec),
        train_seconds=seconds,
        log=log,
        resumed_from=resume_from.name if resume_from else "",
    )


def _shown(data: PreparedData, spec: TrainingSpec) -> _Shown:
    if spec.packing:
        packs = pack(data.train, data.max_length)
        return _Shown(packs, [one.tokens for one in packs])
    return _Shown(data.train, [row.tokens for row in data.train])


def _save(model: Any, target: Path, precision: Precision) -> None:
    """Save what was trained: the adapter alone, or all weights in the type that the base has on disk."""
    if not precision.full:
        # DPO on an earlier adapter keeps a copy of it beside the one that learns.
        model.save_pretrained(str(target), safe_serialization=True, selected_adapters=["default"])
        return
    model.to(precision.saved_dtype).save_pretrained(str(target), safe_serialization=True)


def _resume_point(folder: Path, observer: RunObserver) -> Path | None:
    name = ""
    if ranks.first():
        good, torn = checkpoints.newest_good(folder)
        for torn_name, problem in torn.items():
            observer.note(f"{torn_name} {problem}; it is not used", severity="warning", reason="CHECKPOINT_TORN")
            observer.count("checkpoints", result="torn")
        checkpoints.remove(folder / torn_name for torn_name in torn)
        if good:
            observer.note(f"goes on from {good.name}", reason="RUN_RESUMED")
            name = good.name
    name = ranks.from_first(name)
    return folder / name if name else None


def _build(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    shown: _Shown,
    spec: TrainingSpec,
    precision: Precision,
    folder: Path,
    observer: RunObserver,
    start: Start,
) -> tuple[RowTrainer | PairTrainer, Stopping, SealedCheckpoints]:
    kernels = choose_kernels(model, spec, precision)
    if kernels.note and ranks.first():
        observer.note(kernels.note, reason="KERNELS")
    if precision.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec.gradient_checkpointing)
    if start.adapter is not None:
        model = load_adapter(model, start.adapter, dropout=spec.lora.dropout)
    if spec.early_stopping_patience and not data.validation:
        raise _nothing_to_evaluate()
    tokenizer = _with_pad(tokenizer)
    stopping = Stopping(observer)
    position = data_position(shown.units, effective_batch=_effective_batch(spec), seed=spec.seed)
    sealed = SealedCheckpoints(observer, keep=spec.keep_checkpoints, position=position)
    options: dict[str, Any] = {
        "model": model,
        "args": training_arguments(
            *(len(shown.units), spec, precision, folder),
            run=observer.run,
            evaluates=bool(data.validation),
            liger=kernels.liger,
        ),
        "processing_class": tokenizer,
        "peft_config": None if start.adapter or spec.full else lora_config(spec.lora),
        "callbacks": [
            *(LiveProgress(observer), ResumeReceipt(observer, position), start.samples, stopping, sealed),
            *([EarlyStoppingCallback(spec.early_stopping_patience)] if spec.early_stopping_patience else []),
        ],
        "lengths": shown.lengths,
        "order_seed": spec.seed,
        **_datasets(shown, data, spec),
    }
    if spec.packing or (kernels.padding_free and not spec.preference):
        options["data_collator"] = pack_collator(int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    try:
        trainer = (PairTrainer if spec.preference else RowTrainer)(**options)
    except ValueError as error:
        if "target modules" in str(error).lower():
            message = f"parameters.lora.target_modules does not fit the base: {error}"
            raise invalid_argument(
                "TARGET_MODULES_UNKNOWN", message, parameters__lora__target_modules="does not fit the base"
            ) from error
        raise
    trainer.remove_callback(PrinterCallback)
    if data.validation:
        trainer.add_callback(OverdueEvaluation(trainer, evaluation_steps(len(shown.units), spec)))
    return trainer, stopping, sealed


def _datasets(shown: _Shown, data: PreparedData, spec: TrainingSpec) -> dict[str, Any]:
    if spec.preference:
        make = pair_dataset
    elif spec.packing:
        held_out = pack_dataset([Pack([row]) for row in data.validation]) if data.validation else None
        return {"train_dataset": pack_dataset(shown.units), "eval_dataset": held_out}
    else:
        make = row_dataset
    return {
        "train_dataset": make(shown.units),
        "eval_dataset": make(data.validation) if data.validation else None,
    }


def lora_config(lora: LoraSpec) -> LoraConfig:
    """Return peft's configuration."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions too
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a pad token one for the batches; masked positions never reach the loss."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _effective_batch(spec: TrainingSpec) -> int:
    return spec.batch_size * spec.grad_accum * ranks.count()


def _tokens_seen(epochs: float, lengths: list[int], spec: TrainingSpec) -> int:
    """Count the tokens of every row shown, from the order itself, so that a resumed run counts right."""
    whole = int(epochs)
    part = EpochSampler(lengths, _effective_batch(spec), spec.seed)
    part.set_epoch(whole)
    shown = list(part)[: round((epochs - whole) * len(lengths))]
    return whole * sum(lengths) + sum(lengths[index] for index in shown)


def _nothing_to_evaluate() -> LoralineError:
    message = (
        "parameters.early_stopping_patience needs validation rows: give a dataset that brings some, set "
        "validation_fraction (0.05, for example), or leave early_stopping_patience 0."
    )
    return failed_precondition("NOTHING_TO_EVALUATE", message)


def final_figures(log: list[dict[str, Any]]) -> dict[str, float]:
    """Return mean loss and token accuracy over the last tenth of the steps, and the last eval loss if there is one.

    Raises FAILED_PRECONDITION (NO_STEPS) when nothing was trained.
    """
    steps = [entry for entry in log if "loss" in entry]
    if not steps:
        raise failed_precondition("NO_STEPS", "The run made no step. Raise parameters.epochs or parameters.max_steps.")
    tail = steps[-max(1, len(steps) // 10) :]
    figures = {
        "loss": sum(entry["loss"] for entry in tail) / len(tail),
        "token_accuracy": sum(entry.get("mean_token_accuracy", 0.0) for entry in tail) / len(tail),
    }
    for name, logged in REWARDS.items():
        values = [entry[logged] for entry in tail if logged in entry]
        if values:
            figures[name] = sum(values) / len(values)
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    if evaluations:
        figures["eval_loss"] = evaluations[-1]
    return figures
