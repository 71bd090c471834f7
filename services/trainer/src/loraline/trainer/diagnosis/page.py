"""The judgement as a page for people: curves, reasons, what to run next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.pages.charts import Line, line_chart
from loraline.core.pages.frame import page, section
from loraline.trainer.diagnosis.history import History, Point
from loraline.trainer.diagnosis.judging import Judgement
from loraline.trainer.diagnosis.signs import Sign

_WORDS = {
    pb.VERDICT_GOOD: ("good", "The run did what it should."),
    pb.VERDICT_FAIR: ("warning", "Usable; more training may help."),
    pb.VERDICT_UNDERTRAINED: ("warning", "The loss is still too high."),
    pb.VERDICT_OVERFIT: ("warning", "The rows are learned by heart."),
    pb.VERDICT_DIVERGED: ("error", "The run went astray."),
    pb.VERDICT_NO_SIGNAL: ("error", "Nothing was learned."),
    pb.VERDICT_DATA_BUG: ("error", "The data make learning impossible."),
}


def html_page(title: str, judgement: Judgement, history: History, patch: Mapping[str, object]) -> str:
    """Return the page."""
    name = pb.Verdict.Name(judgement.verdict).removeprefix("VERDICT_").replace("_", " ").lower()
    mark, words = _WORDS[judgement.verdict]
    parts = [f'<div class="card"><p><span class="mark {mark}">{escape(name)}</span> — {escape(words)}</p></div>']
    parts.append(section("Loss, in nats per token", _losses(history)))
    parts.append(section("What was seen", "".join(_shown(sign) for sign in judgement.signs)))
    if patch:
        settings = json.dumps(patch, indent=2, ensure_ascii=False)
        parts.append(section("Run next with", f"<pre>{escape(settings)}</pre>"))
    parts.extend(_others(history))
    steps = history.points[-1].step
    subtitle = f"{steps} steps" + (f", {history.epochs:.1f} epochs" if history.epochs else "")
    return page(title, [f'<p class="soft">{escape(subtitle)}</p>', *parts])


def _losses(history: History) -> str:
    lines = [
        Line("training", [(point.step, point.loss) for point in history.points]),
        Line("running mean", _running_mean(history.points)),
    ]
    if history.evaluations:
        lines.append(Line("evaluation", history.evaluations))
    return line_chart(lines, x_label="step", title="Loss by step")


def _others(history: History) -> list[str]:
    """Return the curves of what was logged besides the loss."""
    accuracy = [(point.step, point.token_accuracy) for point in history.points if point.token_accuracy is not None]
    rates = [(point.step, point.learning_rate) for point in history.points if point.learning_rate]
    norms = [(point.step, point.grad_norm) for point in history.points if point.grad_norm]
    wanted = (("Token accuracy", accuracy), ("Learning rate", rates), ("Gradient norm before clipping", norms))
    return [
        section(heading, line_chart([Line(heading, points)], x_label="step", title=heading))
        for heading, points in wanted
        if len(points) > 1
    ]


def _running_mean(points: tuple[Point, ...]) -> list[tuple[int, float]]:
    """Return an exponential mean with weight 0.1 for the newest value: single batches jump too much to be read."""
    mean, smooth = points[0].loss, []
    for point in points:
        mean = 0.9 * mean + 0.1 * point.loss
        smooth.append((point.step, mean))
    return smooth


def _shown(sign: Sign) -> str:
    mark, word = ("good", "passed") if sign.passed else ("error", "failed") if sign.grave else ("warning", "look")
    remedy = f'<p class="soft">{escape(sign.remedy)}</p>' if sign.remedy else ""
    return (
        f'<div class="card"><p><span class="mark {mark}">{word}</span> {escape(sign.message)} '
        f'<span class="soft">{escape(sign.code)}</span></p>{remedy}</div>'
    )
