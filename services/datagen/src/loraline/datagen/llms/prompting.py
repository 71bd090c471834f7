"""What is sent to the model: one request for N items, drawn from the recipe's seeds."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraline.datagen.llms.recipes import Recipe

WRAPPER = "items"


@dataclass(frozen=True)
class LlmSettings:
    """A checked LLM recipe; the meanings are those of LlmRecipe in the contract."""

    recipe: Recipe
    rows: int
    batch_size: int = 10
    temperature: float = 0.8
    system_prompt: str = ""
    brief: str = ""
    topics: Sequence[str] = ()
    personas: Sequence[str] = ()
    styles: Sequence[str] = ()
    few_shots: Sequence[tuple[str, str]] = ()
    quota_policy: Literal["pause", "wait"] = "pause"
    max_wait_seconds: float = 3600.0
    max_candidates_ratio: float = 3.0
    timeout_seconds: float = 120.0
    max_tokens: int = 0


def payload(settings: LlmSettings, model: str, seed: int, call: int, size: int, *, structured: bool) -> dict[str, Any]:
    """Return the body of call number `call`: the same for the same arguments."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": settings.system_prompt or settings.recipe.system_prompt},
            {"role": "user", "content": _question(settings, seed, call, size)},
        ],
        "temperature": settings.temperature,
    }
    if settings.max_tokens:
        body["max_tokens"] = settings.max_tokens
    if structured:
        body["response_format"] = _response_format(settings.recipe)
    return body


def _question(settings: LlmSettings, seed: int, call: int, size: int) -> str:
    draw = random.Random(f"llm:{seed}:{call}")  # noqa: S311 - reproducible draws, no secrets
    parts = [settings.brief] if settings.brief else []
    for label, values in (("Topic", settings.topics), ("Who asks", settings.personas), ("Style", settings.styles)):
        if values:
            parts.append(f"{label}: {draw.choice(values)}")
    for prompt, response in settings.few_shots:
        parts.append(f"Example of a user turn: {prompt}\nExample of its answer: {response}")
    schema = json.dumps(settings.recipe.item_schema, ensure_ascii=False)
    parts.append(
        f"Write {size} different item{'s' if size != 1 else ''}. This is batch {call + 1}; its items differ from those "
        f'of other batches. Answer with one JSON object {{"{WRAPPER}": [...]}} and nothing else. Each item fits this '
        f"JSON schema:\n{schema}"
    )
    return "\n\n".join(parts)


def _response_format(recipe: Recipe) -> Mapping[str, Any]:
    schema = {
        "type": "object",
        "properties": {WRAPPER: {"type": "array", "items": recipe.item_schema}},
        "required": [WRAPPER],
        "additionalProperties": False,
    }
    name = recipe.name.replace("-", "_")
    return {"type": "json_schema", "json_schema": {"name": name, "strict": recipe.strict_schema, "schema": schema}}
