"""Loraline's LLM source as a dataset job runs it: prompt, limiter, retry, salvage, schema, duplicates, ledger, rows."""

from __future__ import annotations

import os

from measured import Task, main

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.config import CoreSettings
from loraline.datagen.llms.answer_index import AnswerIndex
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.source import llm_rows
from loraline.datagen.rows import Row


def work(task: Task) -> int:
    os.environ.update({
        "LLM_BASE_URL": task.url, "LLM_MODEL": "mock", "LLM_API_KEY": "none",
        "LORALINE_DATAGEN_LLM_CONCURRENCY": str(task.in_flight),
    })  # fmt: skip
    policy = os.environ.get("BENCH_QUOTA_POLICY", "PAUSE")  # PAUSE is the default of a recipe.
    recipe = datagen_pb2.LlmRecipe(
        recipe="instruction-response", rows=task.rows, batch_size=1,
        quota_policy=datagen_pb2.QuotaPolicy.Value(f"QUOTA_POLICY_{policy}"),
    )  # fmt: skip
    source = task.folder / "llm-1"
    source.mkdir(parents=True, exist_ok=True)
    ledger = FileLedger(source / "ledger.jsonl", AnswerIndex(task.folder / "llm-answers.db"))
    with (task.folder / "rows.jsonl").open("w", encoding="utf-8") as rows:

        def accept(row: Row) -> None:
            rows.write(row.to_line())

        core = CoreSettings(data_dir=task.folder)
        return llm_rows(recipe, 1, "asked", source, accept, core=core, ledger=ledger).accepted


if __name__ == "__main__":
    main("loraline-datagen", work)
