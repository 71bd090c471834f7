"""`loraline doctor`: looks at this machine and at the server on it, and says what to do about what it finds.

typer is imported by this module only: servers do not need it, whoever loads this command brings it.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from loraline.core.config import CoreSettings
from loraline.core.diagnostics import Language
from loraline.core.errors import LoralineError
from loraline.core.preflight.finding import CHECKS_GROUP, Check, Finding, Place, ok, recognised
from loraline.core.preflight.machine import check_machine
from loraline.core.preflight.model_folder import check_model_folder
from loraline.core.preflight.network import check_hub

_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}
_LOG_BYTES = 256 * 1024
_SECONDS = 3.0
_MODEL_CHECKS = "merger"
"""Who looks into model folders more closely than core does, where it is installed."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[Path | None, typer.Option(help="Model folder to look into, weights and tokenizer.")] = None,
    log: Annotated[Path | None, typer.Option(help="A server's log, or - for standard input: explains it.")] = None,
    language: Annotated[str, typer.Option(help="en, zh or ko.")] = "en",
    output: Annotated[str, typer.Option("--format", help="auto, text or json; auto is text.")] = "auto",
) -> None:
    """Look at this machine before anything fails, or explain what failed: ports, disk, GPU, hub, model folder, log.

    Ends with 1 when something will not work. The settings are those of the environment, as a server here reads them.
    """
    if language not in get_args(Language) or output not in ("auto", "text", "json"):
        print("loraline doctor: --language is en, zh or ko; --format is auto, text or json", file=sys.stderr)
        raise typer.Exit(2)
    found = list(explain_log(log) if log is not None else examine(Place(CoreSettings(), model)))
    if output == "json":
        print(json.dumps([_as_data(finding) for finding in found], ensure_ascii=False))
    else:
        for finding in found:
            print(_as_text(finding, language))  # type: ignore[arg-type]
    raise typer.Exit(1 if any(finding.level == "failed" for finding in found) else 0)


def examine(place: Place) -> Iterator[Finding]:
    """Look at the machine, at what installed packages check of their own, and at the server that runs here."""
    status = server_status(place.settings)
    for finding in check_machine(place):
        # The port of a server that answers is no problem but its own.
        if status is None or finding.reason != "PORT_TAKEN":
            yield finding
    yield check_hub()
    points = sorted(entry_points(group=CHECKS_GROUP), key=lambda point: point.name)
    if place.model is not None and not any(point.name == _MODEL_CHECKS for point in points):
        yield from check_model_folder(place.model)
    for point in points:
        check: Check = point.load()
        try:
            yield from (f for f in check(place) if status is None or f.reason != "PORT_TAKEN")
        except LoralineError as error:
            yield Finding(point.name, "failed", error.message, error.reason)
    yield from status if status is not None else [ok("server", "no server runs here")]


def server_status(settings: CoreSettings) -> list[Finding] | None:
    """Return what the server on this machine says of itself; None when none answers."""
    if not settings.metrics_listen:
        return None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{settings.metrics_listen}/healthz", timeout=_SECONDS) as answer:
            document: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            document = json.load(error)
        except ValueError:
            return None
    except (OSError, ValueError):
        return None
    reasons = document.get("reasons")
    if not isinstance(reasons, dict):
        return None
    return [_of_stage(str(stage), str(why)) for stage, why in reasons.items()]


def _of_stage(stage: str, why: str) -> Finding:
    if not why:
        return ok(f"server: {stage}", "ready")
    known = recognised(why, f"server: {stage}")
    return known or Finding(f"server: {stage}", "warning", why)


def explain_log(path: Path) -> Iterator[Finding]:
    """Return the known failures in a log's end, newest last, each once."""
    if str(path) == "-":
        text = sys.stdin.read()
    else:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
    seen: dict[str, Finding] = {}
    for line in text.splitlines():
        if (known := recognised(line, "log")) is not None:
            seen[known.reason] = known
    yield from seen.values() or [ok("log", "nothing in it is a known failure")]


def _as_data(finding: Finding) -> dict[str, Any]:
    explained = {language: finding.explained(language) for language in get_args(Language)}
    return {**vars(finding), "explained": explained if finding.reason else {}}


def _as_text(finding: Finding, language: Language) -> str:
    lines = [f"{_MARKS[finding.level]}  {finding.check}: {finding.said}"]
    lines += [f"         {line}" for line in finding.explained(language).splitlines()]
    return "\n".join(lines)
