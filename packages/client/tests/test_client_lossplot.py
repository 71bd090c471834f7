"""The loss curve on a terminal: whatever a run has logged can be drawn."""

from __future__ import annotations

import math

import pytest

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.cli.lossplot import tell_loss
from loraline.client.cli.output import Output


def curve(losses: list[float]) -> list[trainer_pb2.LossPoint]:
    return [trainer_pb2.LossPoint(step=number, loss=loss) for number, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("end", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_number_leaves_the_rest_to_be_drawn(
    end: float, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Output, "terminal", property(lambda _: terminal))
    tell_loss(Output(), curve([3.0, 2.5, 2.0, end, end]))
    shown = capsys.readouterr().out
    assert ("3.00" in shown and "⠀" in shown) if terminal else "loss 2.000" in shown
    assert "inf" not in shown and "nan" not in shown.replace("nats", "")


def test_a_run_without_any_number_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    tell_loss(Output(), curve([math.nan, math.inf]))
    assert capsys.readouterr().out == ""
