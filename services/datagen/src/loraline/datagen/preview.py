"""First rows of a source, made in the calling process and published nowhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import resource_exhausted
from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.convert.engine import ConvertCounts
from loraline.datagen.llms.texts import TextStore, named_texts
from loraline.datagen.rows import Row
from loraline.datagen.sources import Fetch, convert_rows, template_rows

DEFAULT_ROWS = 5


def preview(source: datagen_pb2.DatasetSource, rows: int, seed: int, allowed: list[Path], fetch: Fetch) -> list[Row]:
    """Return up to `rows` rows (5 for 0); a language model is asked for no more than that many, once or a few times."""
    wanted = rows or DEFAULT_ROWS
    kind = source.WhichOneof("source")
    name = source.name or kind or ""
    if kind == "convert":
        return list(islice(convert_rows(source.convert, allowed, fetch, ConvertCounts()), wanted))
    if kind == "template":
        # The whole recipe: its first rows are those that a job with the same seed begins with.
        return list(islice(template_rows(source.template, seed, name), wanted))
    with tempfile.TemporaryDirectory(prefix="preview-") as scratch:
        return _ask(source.llm, wanted, seed, name, lambda few: _first_texts(few, Path(scratch), allowed, fetch))


def _first_texts(few: datagen_pb2.LlmRecipe, scratch: Path, allowed: list[Path], fetch: Fetch) -> TextStore | None:
    """Return as many of the recipe's first texts as rows are wanted, or None when it reads none."""
    if not few.HasField("texts"):
        return None
    store = TextStore(scratch / "texts", islice(named_texts(few.texts, allowed, fetch), few.rows))
    few.rows = len(store)
    return store


def _ask(
    recipe: datagen_pb2.LlmRecipe, wanted: int, seed: int, name: str,
    texts_of: Callable[[datagen_pb2.LlmRecipe], TextStore | None],
) -> list[Row]:  # fmt: skip
    few = datagen_pb2.LlmRecipe()
    few.CopyFrom(recipe)
    few.rows = min(wanted, recipe.rows or wanted)
    texts = texts_of(few)
    few.quota_policy = datagen_pb2.QUOTA_POLICY_PAUSE
    # Here, so that what needs no language model starts without its client.
    from loraline.datagen.llms.hooks import Hooks
    from loraline.datagen.llms.source import llm_rows

    rows: list[Row] = []
    try:
        llm_rows(few, seed, name, None, rows.append, Hooks(go_on="ask for the preview again later."), texts=texts)
    except JobPaused as paused:
        if paused.reason != "LLM_CANDIDATES_EXHAUSTED":
            raise resource_exhausted(paused.reason, paused.message) from paused
    return rows
