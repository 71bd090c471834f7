"""What a finished run is counted as, and that the labels of those counters are a short list."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, failed_precondition
from loraline.trainer.metrics import VERDICTS, job_metrics
from loraline.trainer.verdicts import counting_divergence, verdict_of


def _result(losses: list[float]) -> pb.TrainResult:
    curve = [pb.LossPoint(step=n + 1, loss=loss, token_accuracy=0.97) for n, loss in enumerate(losses)]
    result = pb.TrainResult(loss_curve=curve, epochs=3)
    result.receipt.rows, result.receipt.rows_teaching_eos, result.receipt.trained_tokens = 200, 200, 20_000
    return result


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([3.0 - 0.02 * n for n in range(30)] + [2.4 + 0.3 * n for n in range(30)], "diverged"),
        ([3.0] * 60, "no_signal"),
        ([0.2 + 2.5 * math.exp(-n / 12) for n in range(120)], "good"),
    ],
)
def test_a_finished_run_is_counted_by_its_curve(losses: list[float], verdict: str) -> None:
    assert verdict_of(_result(losses), 3) == verdict
    assert verdict in VERDICTS


def test_a_run_without_a_curve_is_no_crash() -> None:
    assert verdict_of(pb.TrainResult(), 0) == "no_signal"


class _Counts:
    """Stands for the job's context: takes counts."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, str]]] = []

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        self.told.append((name, labels))


@pytest.mark.parametrize(("reason", "counted"), [("LOSS_NOT_FINITE", 1), ("OUT_OF_MEMORY", 0)])
def test_a_loss_that_is_no_number_counts_as_diverged(reason: str, counted: int) -> None:
    counts = _Counts()
    with pytest.raises(LoralineError), counting_divergence(counts):  # type: ignore[arg-type]
        raise failed_precondition(reason, "stopped")
    assert counts.told == [("trainer_runs", {"verdict": "diverged"})] * counted


def test_every_verdict_and_result_stands_at_zero_before_its_first() -> None:
    registry = CollectorRegistry()
    metrics = job_metrics(registry)
    text = generate_latest(registry).decode()
    for verdict in ("good", "fair", "undertrained", "overfit", "diverged", "no_signal", "data_bug"):
        assert f'loraline_trainer_runs_total{{verdict="{verdict}"}} 0.0' in text
    assert 'loraline_trainer_checkpoints_total{result="unpublished"} 0.0' in text
    assert not [name for name, metric in metrics.items() if "run" in metric._labelnames]
