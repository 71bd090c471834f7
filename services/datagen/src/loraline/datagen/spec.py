"""Requests as the domain has them: checked, with defaults, free of the wire's forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import invalid_argument
from loraline.core.structs import json_value
from loraline.datagen.convert.engine import ConvertSettings
from loraline.datagen.llms.request import llm_of
from loraline.datagen.publish.split import DEFAULT_FRACTION
from loraline.datagen.template.engine import Template, TemplateFormat, TemplateSettings, Weighted
from loraline.datagen.template.places import pools_in

FORMATS: dict[int, TemplateFormat] = {
    datagen_pb2.OUTPUT_FORMAT_UNSPECIFIED: "newline",
    datagen_pb2.OUTPUT_FORMAT_NEWLINE: "newline",
    datagen_pb2.OUTPUT_FORMAT_JSON: "json",
}


def split_of(split: datagen_pb2.Split) -> tuple[float, int]:
    """Return the validation fraction and the seed."""
    fraction = split.validation_fraction if split.HasField("validation_fraction") else DEFAULT_FRACTION
    return fraction, split.seed


def named_sources(sources: Sequence[datagen_pb2.DatasetSource]) -> list[tuple[str, datagen_pb2.DatasetSource]]:
    """Return the sources with names; INVALID_ARGUMENT when two share one."""
    named: list[tuple[str, datagen_pb2.DatasetSource]] = []
    for index, source in enumerate(sources):
        kind = source.WhichOneof("source") or ""
        name = source.name or (kind if len(sources) == 1 else f"{kind}-{index + 1}")
        if any(name == other for other, _ in named):
            raise invalid_argument(
                "SOURCE_NAME_TWICE", f"Two sources are named {name!r}. Give each its own name.",
                **{f"sources[{index}]__name": "used twice"},
            )  # fmt: skip
        named.append((name, source))
    return named


def check_source(source: datagen_pb2.DatasetSource, field: str = "source") -> None:
    """Raise what is wrong with a source, as far as its request tells."""
    kind = source.WhichOneof("source")
    if kind == "convert":
        check_location(source.convert, f"{field}.convert")
    elif kind == "template":
        template_of(source.template, f"{field}.template")
    elif kind == "llm":
        llm_of(source.llm, f"{field}.llm")


def check_location(source: datagen_pb2.ConvertSource, field: str) -> None:
    """INVALID_ARGUMENT when the artifact is of another kind than source."""
    artifact = source.artifact
    if source.WhichOneof("location") == "artifact" and artifact.kind != artifact_pb2.ARTIFACT_KIND_SOURCE:
        raise invalid_argument(
            "ARTIFACT_KIND_WRONG", f"{field}.artifact must be a source artifact: raw files, uploaded as kind source.",
            **{f"{field}.artifact.kind": "must be ARTIFACT_KIND_SOURCE"},
        )  # fmt: skip


def convert_of(source: datagen_pb2.ConvertSource) -> ConvertSettings:
    """Return the settings of a conversion."""
    return ConvertSettings(
        source.character.strip(), tuple(source.character_aliases), source.system_prompt, source.default_prompt.strip(),
        source.skip_bad_records,
    )  # fmt: skip


def template_of(recipe: datagen_pb2.TemplateRecipe, field: str) -> TemplateSettings:
    """Return the checked recipe; INVALID_ARGUMENT names the template and what is wrong with it."""
    pools = {name: _pool(pool) for name, pool in recipe.pools.items()}
    shares: list[tuple[TemplateFormat, float]]
    shares = [(FORMATS[share.format], share.weight) for share in recipe.formats] or [("newline", 1.0)]
    wanted = {name for name, _ in shares}
    templates: list[Template] = []
    for index, template in enumerate(recipe.templates):
        place = f"{field}.templates[{index}]"
        response_json = json_value(template.response_json) if template.HasField("response_json") else None
        _check_answers(template, response_json, wanted, place)
        responses = (template.response, *template.response_variations) if "newline" in wanted else ()
        prompts = tuple(dict.fromkeys((template.prompt, *template.prompt_variations)))
        used = pools_in([*prompts, *responses]) | (pools_in(response_json) if "json" in wanted else set())
        missing = sorted(used - pools.keys())
        if missing:
            raise invalid_argument(
                "POOL_MISSING", f"{place} names {', '.join(missing)}, and there is no such pool (there are "
                f"{', '.join(sorted(pools)) or 'none'}). Add it, or write {{{{ and }}}} for plain braces.",
                **{place: f"no pool {', '.join(missing)}"},
            )  # fmt: skip
        weight, places = (template.weight or 1.0) / len(prompts), tuple(sorted(used))
        templates += [Template(prompt, responses, response_json, weight, places, index) for prompt in prompts]
    return TemplateSettings(pools, templates, recipe.rows, shares, recipe.system_prompt, recipe.kind or "template")


def _check_answers(template: datagen_pb2.RowTemplate, response_json: Any, wanted: set[str], place: str) -> None:
    named = {"prompt": [template.prompt], "prompt_variations": template.prompt_variations,
             "response_variations": template.response_variations}  # fmt: skip
    for field, texts in named.items():
        if not all(text.strip() for text in texts):
            raise invalid_argument("TEMPLATE_EMPTY", f"{place}.{field} is blank.", **{f"{place}.{field}": "blank"})
    if "newline" in wanted and not template.response.strip():
        raise invalid_argument(
            "TEMPLATE_WITHOUT_RESPONSE", f"{place} has no response, and NEWLINE rows are wanted. Write it.",
            **{f"{place}.response": "missing"},
        )  # fmt: skip
    if "json" in wanted and not response_json:
        raise invalid_argument(
            "TEMPLATE_WITHOUT_RESPONSE", f"{place} has no response_json, and JSON rows are wanted. Write it.",
            **{f"{place}.response_json": "missing"},
        )  # fmt: skip


def _pool(pool: datagen_pb2.Pool) -> Weighted:
    """Return the pool with equal texts joined: they are one value, drawn as often as all of them."""
    weights: dict[str, float] = {}
    for item in pool.items:
        weights[item.text] = weights.get(item.text, 0.0) + (item.weight or 1.0)
    return Weighted(tuple(weights), tuple(weights.values()))
