"""What a run's loss curve says, counted for alerts when the run ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.core.jobs.context import JobContext
from loraline.trainer.diagnosis.history import from_curve
from loraline.trainer.diagnosis.judging import judge
from loraline.trainer.diagnosis.sign import facts_of
from loraline.trainer.metrics import verdict_name


def verdict_of(result: pb.TrainResult, planned_epochs: float) -> str:
    """Return the verdict on a finished run, such as `good`; `planned_epochs` is what was asked for, 0 when unknown."""
    history = from_curve(result.loss_curve, epochs=result.epochs, planned_epochs=planned_epochs)
    if not history.points:
        return verdict_name(pb.VERDICT_NO_SIGNAL)
    return verdict_name(judge(history, facts_of(result)).verdict)


@contextmanager
def counting_divergence(context: JobContext) -> Iterator[None]:
    """Count a run that stops because its loss is no number; it has no result to be judged by."""
    try:
        yield
    except LoralineError as error:
        if error.reason == "LOSS_NOT_FINITE":
            context.count("trainer_runs", verdict=verdict_name(pb.VERDICT_DIVERGED))
        raise
