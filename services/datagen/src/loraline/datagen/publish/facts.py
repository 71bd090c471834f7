"""What the data card tells of the settings in force: those of the request with every default filled in."""

from __future__ import annotations

from typing import Any

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.datagen.quality.catalogue import CODES
from loraline.datagen.quality.request import FORBIDDEN, gate_of
from loraline.datagen.quality.settings import PROMISES, SIMILARITY
from loraline.datagen.spec import convert_of, template_of


def gate_facts(gate: datagen_pb2.QualityGate) -> dict[str, Any]:
    """Return what the gate held the rows to."""
    refuses = gate_of(gate).refuses
    return {
        "refused_findings": sorted(code for code in CODES if refuses(code)), "drop_duplicates": gate.drop_duplicates,
        "near_duplicate_similarity": gate.near_duplicate_similarity or SIMILARITY, "language": gate.language,
        "forbid": sorted(FORBIDDEN[text] for text in gate.forbid), "max_length": gate.max_length,
        "base_model": format_ref(gate.base_model) if gate.HasField("base_model") else "",
        "max_response_characters": gate.max_response_characters
        or {kind: promise.max_characters for kind, promise in PROMISES.items() if promise.max_characters},
    }  # fmt: skip


def convert_facts(source: datagen_pb2.ConvertSource) -> dict[str, Any]:
    """Return how a conversion read its records."""
    settings = convert_of(source)
    by_artifact = source.WhichOneof("location") == "artifact"
    return {"in_force": {
        "from": format_ref(source.artifact) if by_artifact else "a folder of the server", "subpath": source.subpath,
        "character": settings.character, "character_aliases": list(settings.aliases),
        "system_prompt": settings.system, "default_prompt": settings.default_prompt,
        "skip_bad_records": settings.skip_bad_records,
    }}  # fmt: skip


def template_facts(recipe: datagen_pb2.TemplateRecipe, name: str, seed: int) -> dict[str, Any]:
    """Return what a template recipe drew from."""
    settings = template_of(recipe, name)
    total = sum(weight for _, weight in settings.formats)
    return {
        "rows": settings.rows, "row_kind": settings.kind, "seed": seed, "templates": len(recipe.templates),
        "pools": {name: len(pool.values) for name, pool in sorted(settings.pools.items())},
        "different_rows_possible": sum(settings.combinations(template) for template in settings.templates),
        "formats": {name: round(weight / total, 4) for name, weight in settings.formats},
        "system_prompt": settings.system_prompt,
    }  # fmt: skip
