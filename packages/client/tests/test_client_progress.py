"""How the progress of a job reads: on a terminal, in a pipe, and in the lists of jobs."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from loraline.api.job.v1 import job_pb2
from loraline.client.cli.output import Output
from loraline.client.cli.progress import PlainView, TerminalView, figures_text

COSTLY = {"rows_per_second": 2.126, "cost_usd": 0.1234, "cost_usd_expected": 1.5, "candidates": 700.0}


def progress(eta: int, metrics: Mapping[str, float], unit: str = "row") -> job_pb2.Progress:
    made = job_pb2.Progress(fraction=0.3, step=30, total_steps=100, unit=unit, message="Making rows of asked")
    made.metrics.update(metrics)
    if eta:
        made.eta.FromSeconds(eta)
    return made


def update(told: job_pb2.Progress) -> job_pb2.WatchJobResponse:
    return job_pb2.WatchJobResponse(event=job_pb2.JobEvent(progress=told))


def test_rows_tell_the_time_left_the_rate_and_the_cost() -> None:
    told = "Making rows of asked  row 30/100  3 min left  2.13 rows/s  $0.12 of about $1.50"
    assert figures_text(progress(190, COSTLY)) == told


def test_any_kind_of_job_tells_the_time_left() -> None:
    told = figures_text(progress(190, {"loss": 1.4}, unit="step"))
    assert told == "Making rows of asked  step 30/100  3 min left  loss 1.4"


@pytest.mark.parametrize(("seconds", "told"), [(9, "9 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 00 min"),
                                               (7500, "2 h 05 min")])  # fmt: skip
def test_the_time_left_is_told_roughly(seconds: int, told: str) -> None:
    assert figures_text(progress(seconds, {})).endswith(f"  {told} left")


def test_what_is_unknown_or_nothing_is_left_out() -> None:
    assert figures_text(progress(0, {"rows_per_second": 0, "cost_usd": 0})) == "Making rows of asked  row 30/100"
    assert figures_text(progress(0, {"cost_usd": 0.0004})).endswith("  $0.0004")


def test_a_job_that_stands_still_has_no_time_left() -> None:
    assert "left" not in figures_text(progress(190, COSTLY), live=False)
    assert "$0.12" in figures_text(progress(190, COSTLY), live=False)


def test_a_line_in_a_pipe_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    PlainView(Output()).job_update("dataset", update(progress(190, COSTLY)))
    line = "dataset: 30%  Making rows of asked  row 30/100  3 min left  2.13 rows/s  $0.12 of about $1.50\n"
    assert capsys.readouterr().out == line


def test_the_bar_on_a_terminal_tells_it() -> None:
    output, screen = Output(), io.StringIO()
    output.out = Console(file=screen, force_terminal=True, color_system=None, width=160)
    with TerminalView(output) as view:
        view.started("dataset", "asks")
        view.job_update("dataset", update(progress(190, COSTLY)))
    assert "row 30/100  3 min left  2.13 rows/s  $0.12 of about $1.50" in screen.getvalue()
