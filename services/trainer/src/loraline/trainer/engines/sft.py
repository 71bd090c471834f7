"""Supervised fine-tuning: TRL's SFTTrainer on rows that are already tokens and labels."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl.trainer.sft_config import SFTConfig

from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.trainer import checkpoints
from loraline.trainer.engines.callbacks import LiveProgress, RunObserver, SealedCheckpoints, Stopping
from loraline.trainer.engines.encoding import EncodedRow
from loraline.trainer.engines.loading import Precision, load_adapter
from loraline.trainer.engines.preparing import PreparedData
from loraline.trainer.engines.resuming import ResumeReceipt
from loraline.trainer.engines.row_trainer import RowTrainer
from loraline.trainer.engines.samples import SampleAnswers
from loraline.trainer.engines.sampling import EpochSampler
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


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    spec: TrainingSpec,
    precision: Precision,
    folder: Path,
    observer: RunObserver,
    adapter_folder: Path,
    start: Start,
) -> TrainedRun:
    """Train, going on from the newest good checkpoint in `folder`, and save the adapter to `adapter_folder`.

    Raises FAILED_PRECONDITION (LOSS_NOT_FINITE, RESUME_LOST_STATE, NOTHING_TO_EVALUATE), INVALID_ARGUMENT for target
    modules that the base does not have; torch's error when memory runs out.
    """
    resume_from = _resume_point(folder, observer)
    set_seed(spec.seed)
    trainer, stopping = _build(model, tokenizer, data, spec, precision, folder, observer, start)
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    seconds = time.monotonic() - begin
    log = list(trainer.state.log_history)
    if not stopping.stopped:
        start.samples.take(trainer.model, trainer.state.global_step)
        trainer.model.save_pretrained(str(adapter_folder), safe_serialization=True)  # type: ignore[union-attr]
    return TrainedRun(
        stopped=stopping.stopped,
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        tokens=_tokens_seen(trainer, data, spec),
        train_seconds=seconds,
        log=log,
        resumed_from=resume_from.name if resume_from else "",
    )


def _resume_point(folder: Path, observer: RunObserver) -> Path | None:
    good, torn = checkpoints.newest_good(folder)
    for name, problem in torn.items():
        observer.note(f"{name} {problem}; it is not used", severity="warning", reason="CHECKPOINT_TORN")
        observer.count("checkpoints", result="torn")
    checkpoints.remove(folder / name for name in torn)
    if good:
        observer.note(f"goes on from {good.name}", reason="RUN_RESUMED")
    return good


def total_steps(rows: int, spec: TrainingSpec) -> int:
    """Return the optimizer steps of a run over so many rows an epoch."""
    if spec.max_steps:
        return spec.max_steps
    batches = math.ceil(rows / spec.batch_size)
    return max(1, math.ceil(spec.epochs * max(1, math.ceil(batches / spec.grad_accum))))


def _build(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    spec: TrainingSpec,
    precision: Precision,
    folder: Path,
    observer: RunObserver,
    start: Start,
) -> tuple[RowTrainer, Stopping]:
    if precision.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec.gradient_checkpointing)
    if start.adapter is not None:
        model = load_adapter(model, start.adapter, dropout=spec.lora.dropout)
    stopping = Stopping(observer)
    sealed = SealedCheckpoints(observer, keep=spec.keep_checkpoints)
    callbacks = [LiveProgress(observer), ResumeReceipt(observer), start.samples, stopping, sealed]
    if spec.early_stopping_patience:
        if not data.validation:
            raise _nothing_to_evaluate()
        callbacks.append(EarlyStoppingCallback(spec.early_stopping_patience))
    try:
        trainer = RowTrainer(
            model=model,
            args=_arguments(data, spec, precision, folder),
            train_dataset=_dataset(data.train),
            eval_dataset=_dataset(data.validation) if data.validation else None,
            processing_class=_with_pad(tokenizer),
            peft_config=None if start.adapter else lora_config(spec.lora),
            callbacks=callbacks,
            lengths=[len(row.input_ids) for row in data.train],
            order_seed=spec.seed,
        )
    except ValueError as error:
        if "target modules" in str(error).lower():
            message = f"parameters.lora.target_modules does not fit the base: {error}"
            raise invalid_argument(
                "TARGET_MODULES_UNKNOWN", message, parameters__lora__target_modules="does not fit the base"
            ) from error
        raise
    trainer.remove_callback(PrinterCallback)
    return trainer, stopping


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


def _arguments(data: PreparedData, spec: TrainingSpec, precision: Precision, folder: Path) -> SFTConfig:
    steps = total_steps(len(data.train), spec)
    epoch_steps = max(1, math.ceil(math.ceil(len(data.train) / spec.batch_size) / spec.grad_accum))
    gpu = torch.cuda.is_available()
    evaluates = bool(data.validation)
    eval_steps = spec.eval_steps or min(epoch_steps, steps)
    stops_early = spec.early_stopping_patience > 0
    # The best state must have been saved to be gone back to, so that saving then keeps step with evaluating.
    save_steps = eval_steps if stops_early else spec.save_steps or max(1, math.ceil(steps / 10))
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps or -1,
        learning_rate=spec.learning_rate,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=max(8, spec.batch_size),
        gradient_accumulation_steps=spec.grad_accum,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=math.ceil(spec.warmup_ratio * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        neftune_noise_alpha=spec.neftune_alpha or None,
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=not gpu,
        bf16=precision.dtype == "bf16",
        fp16=precision.dtype == "fp16",
        gradient_checkpointing=spec.gradient_checkpointing,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=eval_steps if evaluates else None,
        save_strategy="steps",
        save_steps=save_steps,
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if stops_early else None,
        greater_is_better=False if stops_early else None,
        restore_callback_states_from_checkpoint=stops_early,
        logging_strategy="steps",
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(spec.report_to) or "none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
    )


def _dataset(rows: list[EncodedRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def _with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a pad token one for the batches; masked positions never reach the loss."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokens_seen(trainer: RowTrainer, data: PreparedData, spec: TrainingSpec) -> int:
    """Count the tokens of every row shown, from the order itself, so that a resumed run counts right."""
    rows = [len(row.input_ids) for row in data.train]
    epochs = float(trainer.state.epoch or 0.0)
    whole = int(epochs)
    part = EpochSampler(rows, spec.batch_size * spec.grad_accum, spec.seed)
    part.set_epoch(whole)
    shown = list(part)[: round((epochs - whole) * len(rows))]
    return whole * sum(rows) + sum(rows[index] for index in shown)


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
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    if evaluations:
        figures["eval_loss"] = evaluations[-1]
    return figures
