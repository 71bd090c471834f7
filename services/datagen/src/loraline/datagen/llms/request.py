"""An LLM recipe of the contract as the domain has it: checked, with defaults."""

from __future__ import annotations

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import invalid_argument
from loraline.core.structs import json_value
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import check_context, find_recipe, reading, with_schema
from loraline.datagen.llms.texts import check_texts
from loraline.datagen.quality.request import FORBIDDEN
from loraline.datagen.quality.settings import check_language


def llm_of(recipe: datagen_pb2.LlmRecipe, field: str) -> LlmSettings:
    """Return the checked recipe; INVALID_ARGUMENT and NOT_FOUND name the field that is wrong."""
    built_in = find_recipe(recipe.recipe)
    check_context(built_in, len(recipe.few_shots), field)
    schema = json_value(recipe.item_schema) if recipe.HasField("item_schema") else None
    if recipe.HasField("texts"):
        _check_texts(recipe, field)
        built_in = reading(built_in, schema)
    elif schema is not None:
        built_in = with_schema(built_in, schema)
    if not recipe.rows and not recipe.HasField("texts"):
        raise invalid_argument(
            "ROWS_MISSING", f"{field}.rows is 0: say how many rows are wanted.", **{f"{field}.rows": "missing"}
        )
    return LlmSettings(
        built_in, recipe.rows, 1 if recipe.HasField("texts") else recipe.batch_size or 10,
        recipe.temperature if recipe.HasField("temperature") else 0.8,
        recipe.system_prompt, recipe.brief, tuple(recipe.topics), tuple(recipe.personas), tuple(recipe.styles),
        tuple((shot.prompt, shot.response) for shot in recipe.few_shots),
        "wait" if recipe.quota_policy == datagen_pb2.QUOTA_POLICY_WAIT else "pause",
        _seconds(recipe, "max_wait", 3600.0), recipe.max_candidates_ratio or 3.0,
        _seconds(recipe, "request_timeout", 120.0), recipe.max_tokens, recipe.max_cost_usd,
        check_language(recipe.language, f"{field}.language"), recipe.kind,
        frozenset(FORBIDDEN[text] for text in recipe.forbid),
    )  # fmt: skip


def _check_texts(recipe: datagen_pb2.LlmRecipe, field: str) -> None:
    if recipe.recipe != "extraction":
        raise invalid_argument(
            "TEXTS_NOT_READ", f"{field}.texts is for the recipe extraction; {recipe.recipe} reads no texts.",
            **{f"{field}.texts": "only for the recipe extraction"},
        )  # fmt: skip
    if recipe.batch_size > 1:
        raise invalid_argument(
            "TEXTS_ONE_AT_A_TIME", f"{field}.batch_size must be 1 with texts: each is sent in a request of its own.",
            **{f"{field}.batch_size": "must be 1 with texts"},
        )  # fmt: skip
    check_texts(recipe.texts, f"{field}.texts")


def _seconds(message: datagen_pb2.LlmRecipe, field: str, default: float) -> float:
    if not message.HasField(field):  # type: ignore[arg-type]
        return default
    seconds = float(getattr(message, field).ToTimedelta().total_seconds())
    if seconds <= 0:
        problem = {field: "must be positive"}
        raise invalid_argument("DURATION_INVALID", f"{field} must be longer than nothing.", **problem)
    return seconds
