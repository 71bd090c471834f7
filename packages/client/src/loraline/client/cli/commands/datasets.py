"""`loraline datasets …`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loraline.api.datagen.v1 import datagen_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.commands import dataset_sources
from loraline.client.cli.commands.jobs import follow
from loraline.client.cli.failures import FAILED, CommandFailed
from loraline.client.cli.output import Output
from loraline.client.cli.plaindata import enum_word
from loraline.client.refs import format_ref, parse_ref
from loraline.client.resources.jobs import job_result
from loraline.client.sync import Loraline

ROWS_TOLD = 5


class Language(StrEnum):
    """Language of the answers."""

    KO = "ko"
    ZH = "zh"
    EN = "en"


class Forbidden(StrEnum):
    """What must not stand in answers."""

    LATIN = "latin"
    DIGITS = "digits"
    EMOJI = "emoji"
    MARKDOWN = "markdown"


class AnswerFormat(StrEnum):
    """How answers are written."""

    JSON = "json"
    NEWLINE = "newline"


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Try recipes and endpoints, check datasets and mend them.")
    app.add_typer(group, name="datasets")
    group.command("check")(check)
    dataset_sources.register(group)


def check(  # noqa: PLR0913, PLR0917 (one argument for each option of the command)
    dataset: Annotated[str, typer.Argument(metavar="NAME", help="Dataset: mareva, mareva:v3 or mareva@alias.")],
    fix: Annotated[bool, typer.Option("--fix", help="Publish a new version with the safe fixes applied.")] = False,
    language: Annotated[Language | None, typer.Option(help="Language that the answers must be in.")] = None,
    forbid: Annotated[list[Forbidden] | None, typer.Option(help="Not in answers; give it several times.")] = None,
    answers: Annotated[AnswerFormat | None, typer.Option(help="How every answer must be written.")] = None,
    max_characters: Annotated[int, typer.Option(min=0, help="Longest answer, in characters.")] = 0,
    base_model: Annotated[str, typer.Option(help="Model in the store whose tokenizer counts.")] = "",
    max_length: Annotated[int, typer.Option(min=0, help="Longest row in tokens; needs --base-model.")] = 0,
    schema: Annotated[Path | None, typer.Option(help="JSON schema (a file) that every JSON answer must fit.")] = None,
    near: Annotated[float, typer.Option(min=0, max=1, help="Likeness of near duplicates; 0 for 0.8.")] = 0,
    allow: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Finding that may be there.")] = None,
    refuse: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="Only these findings fail; not set: every error.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="New folder for report.html and report.json.")] = None,
) -> None:
    """Check a dataset row by row and say what to do; exit code 1 when it is not fit for training.

    Examples:

      loraline datasets check mareva --report mareva-report
      loraline datasets check advice --language ko --forbid emoji --answers json --fix
      loraline datasets check mareva --base-model model/tiny --max-length 512
      loraline datasets check orders --answers json --schema order.schema.json --refuse SCHEMA_MISMATCH --near 0.7
    """
    request = datagen_pb2.CheckDatasetRequest(dataset=parse_ref(dataset, default_kind="dataset"), fix=fix)
    gate = request.gate
    gate.language = language.value if language else ""
    gate.forbid.extend(datagen_pb2.ForbiddenText.Value(f"FORBIDDEN_TEXT_{name.upper()}") for name in forbid or [])
    if answers:
        gate.answer_format = datagen_pb2.OutputFormat.Value(f"OUTPUT_FORMAT_{answers.upper()}")
    gate.max_response_characters, gate.max_length = max_characters, max_length
    if base_model:
        gate.base_model.CopyFrom(parse_ref(base_model, default_kind="model"))
    if schema is not None:
        gate.answer_schema.update(dataset_sources.read_json(schema))
    gate.near_duplicate_similarity = near
    gate.allow_codes.extend(allow or [])
    gate.refuse_codes.extend(refuse or [])
    output = invocation().output
    with invocation().client() as client:
        job = follow(client, output, client.datagen.check(request).name)
        result = job_result(job, datagen_pb2.CheckResult)
        page = _save_report(client, result, report)
    if output.json:
        output.data(result)
    else:
        _tell(output, result, page)
    if not result.passed:
        raise CommandFailed(FAILED)


def _save_report(client: Loraline, result: datagen_pb2.CheckResult, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    client.artifacts.download(result.report, folder)
    return folder / "report.html"


def _tell(output: Output, result: datagen_pb2.CheckResult, page: Path | None) -> None:
    for finding in result.findings:
        severity = enum_word(datagen_pb2.FindingSeverity.DESCRIPTOR, finding.severity).lower()
        output.line(f"{severity}: {finding.code}: {finding.message}")
        rows = list(finding.rows[:ROWS_TOLD])
        more = finding.row_count - len(rows)
        if rows:
            output.line(f"  rows: {', '.join(rows)}{f' and {more} more' if more > 0 else ''}")
        output.line(f"  {finding.why} {finding.remedy}")
    output.line("The dataset passes the gate." if result.passed else "The dataset does not pass the gate.")
    if result.HasField("fixed"):
        output.line(f"fixed: {format_ref(result.fixed)}")
    text = format_ref(result.report)
    output.line(f"report: {page}" if page else f"report: loraline artifacts pull {text} (then open report.html)")
