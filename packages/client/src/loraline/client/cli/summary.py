"""A finished pipeline, told: answers side by side, stages, evidence, and where everything lies."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loraline.client.cli.output import Output, clean, seconds_text
from loraline.client.cli.plaindata import as_data
from loraline.client.cli.progress import outcome_data
from loraline.client.pipeline.report import AskedPrompt, Check, PipelineReport
from loraline.client.resources.inference import Answer

HEADINGS = {"base": "base model", "tuned": "tuned", "merged": "merged model", "answer": "answer"}


def tell_answers(output: Output, answers: list[AskedPrompt]) -> None:
    """Write every question with its answers: columns on a terminal, lines in a pipe."""
    if not answers:
        return
    who = list(answers[0].answers)
    output.say("")
    if not output.terminal:
        for entry in answers:
            output.say(f"[{entry.group}] {entry.prompt}")
            for name in who:
                output.say(f"  {HEADINGS.get(name, name)}: {answer_text(entry.answers[name])}")
        return
    table = Table(box=None, header_style="bold cyan", pad_edge=False, padding=(0, 2, 1, 0), expand=True)
    table.add_column("question", ratio=2, overflow="fold")
    for name in who:
        table.add_column(HEADINGS.get(name, name), ratio=3, overflow="fold")
    group = ""
    for entry in answers:
        if entry.group != group:
            group = entry.group
            table.add_row(f"[bold]{escape(group)}[/bold]")
        cells = [escape(answer_text(entry.answers[name])) for name in who]
        table.add_row(escape(clean(entry.prompt)), *cells)
    output.out.print(table)


def answer_text(answer: Answer) -> str:
    """Return an answer on one line, with what people should know about it."""
    text = " ".join(clean(answer.text).split())
    if answer.finish_reason == "LENGTH":
        text += " …"
    return text or f"(empty{': ' + '; '.join(answer.notices) if answer.notices else ''})"


def tell_stages(output: Output, report: PipelineReport) -> None:
    """Write what each stage made and how long it took."""
    rows = []
    for outcome in report.outcomes:
        time = outcome.how if outcome.how == "already done" else seconds_text(outcome.seconds)
        rows.append([outcome.stage, outcome.artifact_text or outcome.detail, outcome.job, time])
    rows.append(["in all", "", "", seconds_text(report.seconds)])
    output.say("")
    output.table(["stage", "made", "job", "time"], rows)


def tell_checks(output: Output, checks: list[Check]) -> None:
    """Write the evidence with its figures."""
    if not checks:
        return
    output.say("")
    output.say("evidence", "bold cyan")
    width = max(len(check.name) for check in checks)
    grid = Table.grid(padding=(0, 2))
    for check in checks:
        mark, style = ("ok", "green") if check.passed else ("FAILED", "bold red")
        grid.add_row(Text(f"  {mark}", style), Text(check.name, "bold"), Text(clean(check.figures)))
        if not output.terminal:
            output.say(f"  {mark:<7} {check.name:<{width}}  {check.figures}")
    if output.terminal and not output.quiet:
        output.out.print(grid)


def tell_places(output: Output, report: PipelineReport) -> None:
    """Write where the artifacts lie."""
    places = {
        outcome.artifact_text: outcome.artifact.location
        for outcome in report.outcomes
        if outcome.artifact is not None and outcome.artifact.location
    }
    if places:
        output.say("")
        output.say("where everything lies", "bold cyan")
        for name, place in places.items():
            output.say(f"  {name:<28} {place}")


def report_data(report: PipelineReport, checks: list[Check]) -> dict[str, Any]:
    """Return a whole report as plain data."""
    return {
        "type": "summary",
        "pipeline": report.pipeline,
        "seconds": round(report.seconds, 3),
        "stages": [{"stage": outcome.stage} | outcome_data(outcome) for outcome in report.outcomes],
        "evidence": [{"name": check.name, "passed": check.passed, "figures": check.figures} for check in checks],
        "answers": [
            {
                "group": entry.group,
                "prompt": entry.prompt,
                "answers": {
                    who: as_data({"text": answer.text, "model": answer.model, "finish_reason": answer.finish_reason})
                    for who, answer in entry.answers.items()
                },
            }
            for entry in report.answers
        ],
    }
