"""A run's settings as TRL's trainers take them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from loraline.trainer.engines import ranks
from loraline.trainer.engines.loading import Precision
from loraline.trainer.spec import TrainingSpec


def steps_an_epoch(rows: int, spec: TrainingSpec) -> int:
    """Return the optimizer steps of one pass over so many rows, by all processes together."""
    batches = math.ceil(rows / spec.batch_size)
    return max(1, math.ceil(batches / (spec.grad_accum * ranks.count())))


def total_steps(rows: int, spec: TrainingSpec) -> int:
    """Return the optimizer steps of a run over so many rows an epoch."""
    return spec.max_steps or max(1, math.ceil(spec.epochs * steps_an_epoch(rows, spec)))


def evaluation_steps(rows: int, spec: TrainingSpec) -> int:
    """Return the optimizer steps between two evaluations."""
    return spec.eval_steps or min(steps_an_epoch(rows, spec), total_steps(rows, spec))


def training_arguments(
    rows: int, spec: TrainingSpec, precision: Precision, folder: Path, *, run: str, evaluates: bool, liger: bool = False
) -> SFTConfig | DPOConfig:
    """Return the arguments of a run over so many rows an epoch; DPO's where pairs are compared."""
    shared = {
        **_schedule(rows, spec, evaluates=evaluates),
        **_computing(spec, precision),
        "output_dir": str(folder),
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": list(spec.report_to) or "none",
        "run_name": run,
        "use_liger_kernel": liger,
        "project": "loraline",
        "disable_tqdm": True,
        "max_length": None,
    }
    if spec.preference:
        # TRL takes dropout out of a DPO run; where it was asked for, it stays.
        return DPOConfig(**shared, beta=spec.dpo_beta, disable_dropout=spec.lora.dropout == 0)
    return SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}, packing=False)


def _schedule(rows: int, spec: TrainingSpec, *, evaluates: bool) -> dict[str, Any]:
    steps, eval_steps = total_steps(rows, spec), evaluation_steps(rows, spec)
    stops_early = spec.early_stopping_patience > 0
    # The best state must have been saved to be gone back to, so that saving then keeps step with evaluating.
    save_steps = eval_steps if stops_early else spec.save_steps or max(1, math.ceil(steps / 10))
    return {
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps or -1,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.lr_scheduler,
        "warmup_steps": math.ceil(spec.warmup_ratio * steps),
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "neftune_noise_alpha": spec.neftune_alpha or None,
        "seed": spec.seed,
        "data_seed": spec.seed,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": eval_steps if evaluates else None,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "load_best_model_at_end": stops_early,
        # The best state is known, and kept by rotation, whether or not it ends the run.
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "restore_callback_states_from_checkpoint": stops_early,
    }


def _computing(spec: TrainingSpec, precision: Precision) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": spec.batch_size,
        # As in training, so that an evaluation that runs out of memory gets smaller batches with it.
        "per_device_eval_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.grad_accum,
        "use_cpu": not gpu,
        "bf16": precision.dtype == "bf16",
        "fp16": precision.dtype == "fp16",
        "gradient_checkpointing": spec.gradient_checkpointing,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
        "optim": "adamw_torch_fused" if gpu else "adamw_torch",
        # Every weight that is trained takes part in every step, so that nobody need look for those that do not.
        "ddp_find_unused_parameters": False if ranks.count() > 1 else None,
        "ddp_backend": "gloo" if ranks.count() > 1 and not gpu else None,
    }
