"""One ingredient of a dataset: from its request to its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.server_paths import allowed_path
from loraline.datagen.convert.engine import ConvertCounts, convert
from loraline.datagen.convert.files import SourceFiles, find_files
from loraline.datagen.rows import Row
from loraline.datagen.spec import convert_of, template_of
from loraline.datagen.template.engine import Known, generate

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


def template_rows(
    recipe: datagen_pb2.TemplateRecipe, seed: int, name: str, stands_already: Known = lambda _: False
) -> Iterator[Row]:
    """Yield the rows of a template recipe, and none that `stands_already` in the dataset."""
    return generate(template_of(recipe, name), seed, name, stands_already)


Location = datagen_pb2.ConvertSource | datagen_pb2.TextSource


def located(sources: Iterable[datagen_pb2.DatasetSource]) -> list[Location]:
    """Return the parts of the sources that name an artifact."""
    parts: list[Location] = []
    for source in sources:
        if source.convert.WhichOneof("location") == "artifact":
            parts.append(source.convert)
        elif source.llm.texts.HasField("artifact"):
            parts.append(source.llm.texts)
    return parts
