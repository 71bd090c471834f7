"""The rows of one LLM recipe, for a job or a preview."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.config import CoreSettings
from loraline.core.jobs.context import JobContext
from loraline.datagen.config import DatagenSettings
from loraline.datagen.llms.answer_index import AnswerIndex
from loraline.datagen.llms.endpoint import endpoints_of
from loraline.datagen.llms.facts import llm_facts
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger import CallRecord, Ledger, NoLedger
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.ledger_table import TableLedger
from loraline.datagen.llms.request import llm_of
from loraline.datagen.llms.routes import Pace
from loraline.datagen.llms.texts import TextStore
from loraline.datagen.quality.rows import RowCheck
from loraline.datagen.rows import Row

LIMITS_FOLDER = "llm-limits"
ANSWERS_INDEX = "llm-answers.db"
DAY_SECONDS = 86400.0


def open_ledger(context: JobContext, source: int, folder: Path) -> Ledger:
    """Return the ledger of a job's source number `source`, from 1: a file in its folder, or a table where replicas on
    several machines share a database."""
    days = DatagenSettings().llm_answers_days
    since = time.time() - days * DAY_SECONDS if days else math.inf
    if not context.database.is_sqlite:
        return TableLedger(context.database, context.job, source, since)
    index = AnswerIndex(context.settings.data_dir / ANSWERS_INDEX)
    return FileLedger(folder / "ledger.jsonl", index, since)


def llm_rows(  # noqa: PLR0913, PLR0917 (what the service, the job and the dataset bring)
    recipe: datagen_pb2.LlmRecipe,
    seed: int,
    name: str,
    folder: Path | None,
    accept: Callable[[Row], Any],
    hooks: Hooks | None = None,
    core: CoreSettings | None = None,
    check: RowCheck | None = None,
    texts: TextStore | None = None,
    longest_text: int = 0,
    ledger: Ledger | None = None,
) -> Intake:
    """Ask the recipe's endpoints until all rows were given to `accept`; return the counts. Runs its own event loop.

    `check` turns down rows that the dataset's gate would refuse; `longest_text` is the gate's limit of an answer, 0 for
    that of the rows' kind. `texts` are those of a recipe that reads some. `folder` keeps
    `unparsable.jsonl` (answers that held no item, with the reason), `ledger` the calls; None keeps nothing. The ledger
    is closed at the end.
    """
    settings, own = replace(llm_of(recipe, name), texts=texts, longest_text=longest_text), DatagenSettings()
    endpoints = endpoints_of(recipe)
    pace = Pace(
        own.llm_concurrency, own.llm_backoff_seconds,
        limits_folder=core.data_dir / LIMITS_FOLDER if core else None, probe_seconds=own.probe_timeout_seconds,
    )  # fmt: skip
    ledger = ledger or NoLedger()
    try:
        with _Unparsable(folder) as unparsable:
            intake = Intake(settings, name, accept, unparsable.write, check)
            intake.facts = llm_facts(settings, endpoints, seed)
            asyncio.run(LlmRun(settings, endpoints, ledger, intake, seed, hooks, pace).run())
    finally:
        ledger.close()
    return intake


def job_hooks(context: JobContext, rows: int, progress: Callable[[Intake, dict[str, float]], None]) -> Hooks:
    """Return the hooks of a job; `progress` gets the counts and the figures of the job's live progress."""
    started, begun = time.monotonic(), [-1, 0.0]

    def report(intake: Intake) -> None:
        if begun[0] < 0:
            begun[:] = [intake.accepted, intake.cost]  # what an earlier attempt had made says nothing of the speed
        made, seconds = intake.accepted - begun[0], max(1e-3, time.monotonic() - started)
        figures = {
            "candidates": float(intake.candidates), "prompt_tokens": float(intake.prompt_tokens),
            "completion_tokens": float(intake.completion_tokens), "timeouts": float(intake.outcomes["timeout"]),
            "cost_usd": intake.cost, "rows_per_second": made / seconds, "repaired": float(intake.outcomes["repaired"]),
        }  # fmt: skip
        if intake.accepted and intake.cost:
            figures["cost_usd_expected"] = intake.cost / intake.accepted * rows
        progress(intake, figures)

    return Hooks(
        progress=report,
        note=lambda reason, message: context.note(message, severity="warning", reason=reason),
        stopping=lambda: bool(context.stop_cause),
        check_stop=context.check_stop,
        count=context.count,
        gauge=context.gauge,
        go_on=f"loraline jobs resume {context.job}",
    )


class _Unparsable:
    """The file of answers that held no item, written anew by each attempt: the ledger tells them all again."""

    def __init__(self, folder: Path | None):
        self._file = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "unparsable.jsonl").open("w", encoding="utf-8", errors="replace")

    def __enter__(self) -> _Unparsable:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: CallRecord, why: str) -> None:
        if self._file is not None:
            told = {"call": record.call + 1, "reason": why, "model": record.model, "content": record.content,
                    "finish_reason": record.finish_reason}  # fmt: skip
            self._file.write(json.dumps(told, ensure_ascii=False) + "\n")
            self._file.flush()
