"""An LLM recipe of the contract as the domain has it: checked, with defaults."""

from __future__ import annotations

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import invalid_argument
from loraline.core.structs import json_value
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import check_context, find_recipe, with_schema
from loraline.datagen.quality.settings import check_language


def llm_of(recipe: datagen_pb2.LlmRecipe, field: str) -> LlmSettings:
    """Return the checked recipe; INVALID_ARGUMENT and NOT_FOUND name the field that is wrong."""
    built_in = find_recipe(recipe.recipe)
    check_context(built_in, len(recipe.few_shots), field)
    if recipe.HasField("item_schema"):
        built_in = with_schema(built_in, json_value(recipe.item_schema))
    return LlmSettings(
        built_in, recipe.rows, recipe.batch_size or 10,
        recipe.temperature if recipe.HasField("temperature") else 0.8,
        recipe.system_prompt, recipe.brief, tuple(recipe.topics), tuple(recipe.personas), tuple(recipe.styles),
        tuple((shot.prompt, shot.response) for shot in recipe.few_shots),
        "wait" if recipe.quota_policy == datagen_pb2.QUOTA_POLICY_WAIT else "pause",
        _seconds(recipe, "max_wait", 3600.0), recipe.max_candidates_ratio or 3.0,
        _seconds(recipe, "request_timeout", 120.0), recipe.max_tokens, recipe.max_cost_usd,
        check_language(recipe.language, f"{field}.language"),
    )  # fmt: skip


def _seconds(message: datagen_pb2.LlmRecipe, field: str, default: float) -> float:
    if not message.HasField(field):  # type: ignore[arg-type]
        return default
    seconds = float(getattr(message, field).ToTimedelta().total_seconds())
    if seconds <= 0:
        problem = {field: "must be positive"}
        raise invalid_argument("DURATION_INVALID", f"{field} must be longer than nothing.", **problem)
    return seconds
