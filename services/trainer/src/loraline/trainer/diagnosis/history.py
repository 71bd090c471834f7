"""The log of a run in one shape, from a job's result or from any trainer_state.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, invalid_argument


@dataclass(frozen=True)
class Point:
    """What was logged at a step."""

    step: int
    loss: float
    """In nats per token; may be NaN or infinite."""
    token_accuracy: float | None = None
    """0 to 1; None where it was not logged."""
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    """Before clipping."""


@dataclass(frozen=True)
class History:
    """A run's log."""

    points: tuple[Point, ...]
    """In the order of logging."""
    evaluations: tuple[tuple[int, float], ...] = ()
    """Step and evaluation loss."""
    epochs: float = 0.0
    """Passes over the data that were made; 0 when unknown."""
    planned_epochs: float = 0.0
    """Passes that were asked for; 0 when unknown."""

    @property
    def tail(self) -> tuple[Point, ...]:
        """The last tenth of the points, at least one."""
        return self.points[-max(1, len(self.points) // 10) :]

    @property
    def head(self) -> tuple[Point, ...]:
        """The first twentieth of the points, at least one."""
        return self.points[: max(1, len(self.points) // 20)]


def mean_loss(points: Sequence[Point]) -> float:
    """Return the mean loss in nats per token."""
    return sum(point.loss for point in points) / len(points)


def mean_accuracy(points: Sequence[Point]) -> float | None:
    """Return the mean token accuracy; None when it was not logged."""
    known = [point.token_accuracy for point in points if point.token_accuracy is not None]
    return sum(known) / len(known) if known else None


def smoothed(points: Sequence[Point], bins: int = 20) -> list[float]:
    """Return the mean loss of `bins` stretches of equal length (fewer when there are fewer points)."""
    bins = min(bins, len(points))
    edges = [round(number * len(points) / bins) for number in range(bins + 1)]
    return [mean_loss(points[begin:end]) for begin, end in pairwise(edges)]


def from_curve(curve: Iterable[pb.LossPoint], *, epochs: float = 0.0, planned_epochs: float = 0.0) -> History:
    """Return the history of a run of this platform."""
    points, evaluations = [], []
    for entry in curve:
        accuracy = entry.token_accuracy if entry.token_accuracy > 0 else None
        points.append(Point(entry.step, entry.loss, accuracy, entry.learning_rate, entry.grad_norm))
        if entry.HasField("eval_loss"):
            evaluations.append((int(entry.step), entry.eval_loss))
    return History(tuple(points), tuple(evaluations), epochs, planned_epochs)


def from_trainer_state(content: bytes) -> History:
    """Return the history in a trainer_state.json as transformers' Trainer writes it.

    Raises INVALID_ARGUMENT (NOT_A_TRAINER_STATE) that says what is missing.
    """
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _not_a_state(f"is not JSON: {error}") from error
    if not isinstance(state, Mapping) or not isinstance(state.get("log_history"), list):
        raise _not_a_state("has no list log_history")
    return from_state(state)


def from_state(state: Mapping[str, Any]) -> History:
    """Return the history in a parsed trainer_state.json; entries without figures are passed over."""
    points, evaluations = [], []
    for entry in state.get("log_history", []):
        if not isinstance(entry, Mapping):
            continue
        step = int(_number(entry.get("step")) or 0)
        loss, evaluation = _number(entry.get("loss")), _number(entry.get("eval_loss"))
        if loss is not None:
            rate, norm = _number(entry.get("learning_rate")) or 0.0, _number(entry.get("grad_norm")) or 0.0
            points.append(Point(step, loss, _number(entry.get("mean_token_accuracy")), rate, norm))
        if evaluation is not None:
            evaluations.append((step, evaluation))
    if not points:
        raise _not_a_state("has no entry with a loss: the run logged nothing (logging_steps too large?)")
    epochs, planned = _number(state.get("epoch")) or 0.0, _number(state.get("num_train_epochs")) or 0.0
    return History(tuple(points), tuple(evaluations), epochs, planned)


def to_curve(history: History) -> list[pb.LossPoint]:
    """Return the history as the contract shows it."""
    evaluations = dict(history.evaluations)
    curve = []
    for point in history.points:
        entry = pb.LossPoint(
            step=max(point.step, 0),
            loss=point.loss,
            token_accuracy=point.token_accuracy or 0.0,
            learning_rate=point.learning_rate,
            grad_norm=point.grad_norm,
        )
        if point.step in evaluations:
            entry.eval_loss = evaluations[point.step]
        curve.append(entry)
    return curve


def _number(value: Any) -> float | None:
    """Return a figure; transformers writes NaN as a bare word or, in older files, as a string."""
    if isinstance(value, str):
        return float(value) if value.lower() in ("nan", "inf", "-inf", "infinity", "-infinity") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _not_a_state(problem: str) -> LoralineError:
    message = (
        f"trainer_state_json {problem}. Give the trainer_state.json of a checkpoint-* folder, as transformers' Trainer "
        "writes it."
    )
    return invalid_argument("NOT_A_TRAINER_STATE", message, trainer_state_json=problem)
