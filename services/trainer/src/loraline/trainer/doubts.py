"""What looks wrong about a run's settings although it could start: remarks of the checklist before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.model_files.objects import text_setting
from loraline.trainer.spec import TrainingSpec

_HIGHEST_RATE, _LOWEST_RATE = 5e-3, 1e-6
"""LoRA learns between them; outside, a run diverges or does not move."""
_FEWEST_STEPS = 20
_MOST_PASSES = 30
_VALUES_A_ROW = 8
"""A rank above so many times the rows has far more weights than there is to learn."""
_VALIDATE = "Give a dataset with validation.jsonl, or set validation_fraction (0.05, for example)."


def doubts(spec: TrainingSpec, rows: int, steps: int) -> Iterator[pb.PlanCheck]:
    """Yield warnings on the settings for so many rows an epoch and steps in all; none when nothing looks wrong."""
    rate, effective = spec.learning_rate, spec.batch_size * spec.grad_accum
    if rate > _HIGHEST_RATE:
        text = f"learning_rate {rate:g} is above {_HIGHEST_RATE:g}: such runs diverge."
        yield _doubt("LEARNING_RATE_HIGH", text, "Take 2e-4, the default.")
    elif rate < _LOWEST_RATE:
        text = f"learning_rate {rate:g} is below {_LOWEST_RATE:g}: the loss will not move."
        yield _doubt("LEARNING_RATE_LOW", text, "Take 2e-4, the default.")
    if effective > max(1, rows):
        text = f"batch_size × grad_accum is {effective}, and there are {rows} rows an epoch: one step an epoch."
        yield _doubt("BATCH_ABOVE_ROWS", text, "Lower parameters.grad_accum or parameters.batch_size.")
    if steps < _FEWEST_STEPS:
        text = f"The run takes {steps} steps; schedule and warm-up want at least {_FEWEST_STEPS}."
        yield _doubt("FEW_STEPS", text, "Raise parameters.epochs, or lower parameters.batch_size.")
    passes = steps * effective / max(1, rows)
    if passes > _MOST_PASSES:
        text = f"Every row is shown {passes:.0f} times: rows are learned by heart well before."
        yield _doubt(
            "MANY_EPOCHS", text, f"Set parameters.epochs to {_MOST_PASSES} or less, or early_stopping_patience."
        )
    if spec.lora.r > _VALUES_A_ROW * rows:
        text = f"lora.r is {spec.lora.r} for {rows} rows."
        yield _doubt("RANK_ABOVE_ROWS", text, "Take a lower rank, such as 16.")


def unused(request: pb.TrainRequest, *, own_validation: int, validation: int) -> Iterator[pb.PlanCheck]:
    """Yield settings that mean nothing, or are overridden, beside the others; `validation` rows there will be.

    `own_validation` rows of them come with the datasets. Early stopping without any ends the run, which is an error.
    """
    p = request.parameters
    if p.early_stopping_patience and not validation:
        text = "early_stopping_patience is set, and there are no validation rows: the run would be refused."
        yield _doubt("NOTHING_TO_EVALUATE", text, _VALIDATE, job_pb2.SEVERITY_ERROR)
    elif p.eval_steps and not validation:
        text = "eval_steps is set, and there are no validation rows: nothing will be evaluated."
        yield _doubt("NOTHING_TO_EVALUATE", text, _VALIDATE)
    if request.validation_fraction and own_validation:
        text = f"validation_fraction is not used: the datasets bring {own_validation} validation rows of their own."
        yield _doubt("VALIDATION_FRACTION_UNUSED", text, "Leave it out, or take datasets without validation.jsonl.")
    if p.save_steps and p.early_stopping_patience and p.save_steps != p.eval_steps:
        text = "save_steps is not used beside early_stopping_patience: a checkpoint is saved at each evaluation."
        yield _doubt("SAVE_STEPS_UNUSED", text, "Set parameters.eval_steps to it, or leave it out.")
    if p.max_truncated_share and p.length_policy not in (pb.LENGTH_POLICY_TRUNCATE, pb.LENGTH_POLICY_DROP):
        text = "max_truncated_share is not used: it bounds LENGTH_POLICY_TRUNCATE, and warns under LENGTH_POLICY_DROP."
        yield _doubt("TRUNCATED_SHARE_UNUSED", text, "Set parameters.length_policy to TRUNCATE, or leave it out.")


def above_model(wanted: int, config: Mapping[str, Any]) -> Iterator[pb.PlanCheck]:
    """Yield a warning when `wanted` tokens, 0 for the default, are more than the base takes by its config.json."""
    limit = text_setting(config, "max_position_embeddings")
    if isinstance(limit, int) and 0 < limit < wanted:
        text = f"max_length is {wanted}, and the base takes {limit} tokens: {limit} is what counts."
        yield _doubt("MAX_LENGTH_ABOVE_MODEL", text, f"Set parameters.max_length to {limit} or less.")


def _doubt(
    code: str, message: str, remedy: str, severity: job_pb2.Severity.ValueType = job_pb2.SEVERITY_WARNING
) -> pb.PlanCheck:
    return pb.PlanCheck(code=code, severity=severity, passed=False, message=message, remedy=remedy)
