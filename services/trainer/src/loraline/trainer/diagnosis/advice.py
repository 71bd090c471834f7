"""What to run next: a judgement turned into TrainingParameters."""

from __future__ import annotations

import math

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.diagnosis.history import History
from loraline.trainer.diagnosis.judging import Judgement

HIGHEST_RANK = 128
"""Greatest lora.r that is advised; beyond it a larger base is."""


def config_patch(judgement: Judgement, history: History, now: pb.TrainingParameters) -> dict[str, object]:
    """Return the fields of TrainingParameters to change, by name; empty when nothing needs to change.

    `now` are the run's settings with defaults written out. Every patch is one that Train accepts: where all weights are
    trained, there is no rank to raise.
    """
    patch = _patch(judgement, history, now)
    if not now.HasField("lora"):
        patch.pop("lora", None)
    return patch


def _patch(judgement: Judgement, history: History, now: pb.TrainingParameters) -> dict[str, object]:
    verdict, codes = judgement.verdict, {sign.code for sign in judgement.signs if not sign.passed}
    if verdict == pb.VERDICT_DIVERGED:
        patch: dict[str, object] = {"learning_rate": _rate(now.learning_rate / 3), "warmup_ratio": 0.1}
        if "LOSS_NOT_FINITE" in codes and now.dtype == "fp16":
            patch["dtype"] = "bf16"
        return patch
    if verdict == pb.VERDICT_NO_SIGNAL:
        return {"learning_rate": _rate(min(now.learning_rate * 10, 1e-2))}
    if verdict == pb.VERDICT_DATA_BUG:
        return {"max_length": min(now.max_length * 2, 1048576)} if "NO_TRAINED_TOKENS" in codes else {}
    if verdict == pb.VERDICT_OVERFIT:
        length: dict[str, object] = (
            {"max_steps": _best_step(history)} if now.max_steps else {"epochs": _best_epochs(history, now.epochs)}
        )
        return {**length, "lora": {"dropout": 0.05}, "early_stopping_patience": 3}
    if verdict in (pb.VERDICT_UNDERTRAINED, pb.VERDICT_FAIR):
        return _more_training(now, settled=judgement.settled)
    return {}


def _more_training(now: pb.TrainingParameters, *, settled: bool) -> dict[str, object]:
    factor = 1.5 if settled else 2
    # Where steps are asked for, epochs mean nothing.
    patch: dict[str, object] = (
        {"max_steps": math.ceil(now.max_steps * factor)}
        if now.max_steps
        else {"epochs": float(math.ceil(now.epochs * factor))}
    )
    rank = min(now.lora.r * 2, HIGHEST_RANK)
    if settled and rank > now.lora.r:  # too high: longer alone would not help, more room does
        patch["lora"] = {"r": rank, "alpha": 2.0 * rank}
    return patch


def _best_epochs(history: History, epochs: float) -> float:
    """Return the epochs after which the evaluation loss was lowest, at least one."""
    last_step = max(history.points[-1].step, 1)
    return float(max(1, math.ceil((history.epochs or epochs) * _best_step(history) / last_step)))


def _best_step(history: History) -> int:
    """Return the step at which the evaluation loss was lowest, at least 1."""
    return max(1, min(history.evaluations, key=lambda entry: entry[1])[0])


def _rate(rate: float) -> float:
    """Return a learning rate with two digits."""
    return float(f"{rate:.1e}")
