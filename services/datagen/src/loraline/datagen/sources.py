"""One ingredient of a dataset: from its request to its rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import failed_precondition
from loraline.core.server_paths import allowed_path
from loraline.datagen.config import DatagenSettings
from loraline.datagen.convert.engine import ConvertCounts, convert
from loraline.datagen.convert.files import SourceFiles, find_files
from loraline.datagen.rows import Row
from loraline.datagen.spec import convert_of, endpoint_of, llm_of, template_of
from loraline.datagen.template.engine import generate

if TYPE_CHECKING:
    from loraline.datagen.llms.endpoint import Endpoint
    from loraline.datagen.llms.hooks import Hooks
    from loraline.datagen.llms.intake import Intake

Fetch = Callable[[artifact_pb2.ArtifactRef], Path]


def locate(source: datagen_pb2.ConvertSource, allowed: list[Path], fetch: Fetch) -> SourceFiles:
    """Return the files of a convert source: an artifact's, or those of an allowed path."""
    if source.WhichOneof("location") == "artifact":
        folder = fetch(source.artifact)
        return find_files(folder, source.subpath, source.artifact.name, frozenset({"manifest.json"}))
    return find_files(allowed_path(source.path, allowed, "source.path"), source.subpath)


def convert_rows(
    source: datagen_pb2.ConvertSource, allowed: list[Path], fetch: Fetch, counts: ConvertCounts
) -> Iterator[Row]:
    """Yield the rows of raw files; `counts` is filled on the way."""
    return convert(locate(source, allowed, fetch), convert_of(source), counts)


def template_rows(recipe: datagen_pb2.TemplateRecipe, seed: int, name: str) -> Iterator[Row]:
    """Yield the rows of a template recipe."""
    return generate(template_of(recipe, name), seed, name)


def endpoint_for(recipe: datagen_pb2.LlmRecipe) -> Endpoint:
    """Return the configured endpoint of a recipe; typed errors when it or its model is not configured."""
    from loraline.datagen.llms.endpoint import from_environment

    endpoint = from_environment(*endpoint_of(recipe))
    if not endpoint.model:
        raise failed_precondition(
            "ENDPOINT_MODEL_NOT_SET", f"No model is named for the endpoint {endpoint.name}. Set LLM_MODEL in the "
            "environment of the datagen service, or `model` in the request.", endpoint=endpoint.name,
        )  # fmt: skip
    return endpoint


def llm_rows(
    recipe: datagen_pb2.LlmRecipe,
    seed: int,
    name: str,
    ledger_path: Path | None,
    accept: Callable[[Row], Any],
    hooks: Hooks | None = None,
) -> Intake:
    """Ask the recipe's endpoint until all rows were given to `accept`; return the counts. Runs its own event loop."""
    # Here, so that jobs without a language model start without its client.
    from loraline.datagen.llms.generate import LlmRun, Pace
    from loraline.datagen.llms.intake import Intake
    from loraline.datagen.llms.ledger import Ledger

    settings, own = llm_of(recipe, name), DatagenSettings()
    intake = Intake(settings, name, accept)
    ledger = Ledger(ledger_path)
    pace = Pace(own.llm_concurrency, own.llm_backoff_seconds)
    try:
        asyncio.run(LlmRun(settings, endpoint_for(recipe), ledger, intake, seed, hooks, pace).run())
    finally:
        ledger.close()
    return intake
