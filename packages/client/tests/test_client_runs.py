"""`loraline runs batch` and `diagnose`: what a pipe and a program read."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.cli import main as command
from loraline.client.cli.commands.runs import with_marks

ROW = trainer_pb2.BatchRow(
    token_ids=[1, 9, 8, 2], tokens=["<|user|>\n", "", "조", "Aye"], trained=[False, False, False, True], length=7
)
JUDGEMENT = trainer_pb2.DiagnoseResponse(
    verdict=trainer_pb2.VERDICT_GOOD,
    reasons=[
        trainer_pb2.PlanCheck(message="There are 3 rows.", remedy="Add rows.", phase=trainer_pb2.RUN_PHASE_BEFORE),
        trainer_pb2.PlanCheck(message="The loss is 0.2.", passed=True, phase=trainer_pb2.RUN_PHASE_AFTER),
    ],
    samples=[trainer_pb2.SampleAnswers(prompt="누구세요?", origin="on_topic", base="tide", adapter="Aye 🙂")],
    loss_curve=[trainer_pb2.LossPoint(step=step, loss=1 / step) for step in range(1, 9)],
    html="<p>",
)


@pytest.fixture
def address(fake_platform, monkeypatch, start_here):
    """A platform that knows one run."""

    async def get_run(self, request, context):
        rows = [ROW] if request.name == "mareva" else []
        return trainer_pb2.GetRunResponse(run=trainer_pb2.Run(name=request.name, first_batch=rows))

    async def diagnose(self, request, context):
        return JUDGEMENT

    monkeypatch.setattr(fake_platform.Trainer, "GetRun", get_run)
    monkeypatch.setattr(fake_platform.Trainer, "Diagnose", diagnose)
    return start_here()


def call(address, *arguments):
    return CliRunner().invoke(command.build(), ["runs", *arguments, "--address", address])


def test_the_first_batch_as_text_by_token_and_as_data(address):
    shown = call(address, "batch", "mareva")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == "row 1: 7 tokens, the first 4 shown, 1 carry loss\n<|user|>\n조⟦Aye⟧\n\n"
    lines = call(address, "batch", "mareva", "--tokens").stdout.splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["0", "1", "<|user|>\\n"],
        ["1", "9"],
        ["2", "8", "조"],
        ["3", "2", "loss", "Aye"],
    ]
    data = json.loads(call(address, "batch", "mareva", "--format", "json").stdout)
    assert data[0]["tokens"] == list(ROW.tokens)
    assert "nothing yet" in call(address, "batch", "other").stdout


def test_marks_stand_around_each_answer():
    row = trainer_pb2.BatchRow(tokens=["q", "A", "B", "q", "C"], trained=[False, True, True, False, True])
    assert with_marks(row) == "q⟦AB⟧q⟦C⟧"
    assert with_marks(trainer_pb2.BatchRow(tokens=["q"], trained=[False])) == "q"


def test_a_judgement_tells_its_checklists_and_both_answers(address, tmp_path):
    page = tmp_path / "page.html"
    done = call(address, "diagnose", "mareva", "--html", str(page))
    assert done.exit_code == 0, done.output
    words = (
        "verdict: good",
        "before: data and settings",
        "look  There are 3 rows.",
        "Add rows.",
        "after: what came out",
        "ok    The loss is 0.2.",
        "asked (on topic): 누구세요?",
        "base     tide",
        "adapter  Aye 🙂",
    )
    places = [done.stdout.find(word) for word in words]
    assert -1 not in places and places == sorted(places), done.stdout
    assert "during" not in done.stdout and page.read_text() == "<p>"
    assert call(address, "diagnose").exit_code == 2
