"""What looks wrong about a run's settings although it could start: remarks of the checklist before a run."""

from __future__ import annotations

from collections.abc import Iterator

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.spec import TrainingSpec

_HIGHEST_RATE, _LOWEST_RATE = 5e-3, 1e-6
"""LoRA learns between them; outside, a run diverges or does not move."""
_FEWEST_STEPS = 20
_MOST_PASSES = 30
_VALUES_A_ROW = 8
"""A rank above so many times the rows has far more weights than there is to learn."""


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


def _doubt(code: str, message: str, remedy: str) -> pb.PlanCheck:
    severity = job_pb2.SEVERITY_WARNING
    return pb.PlanCheck(code=code, severity=severity, passed=False, message=message, remedy=remedy)
