"""What the data card tells of a language-model source: every setting in force, and nothing secret."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.prompting import LlmSettings, Prompter


def llm_facts(settings: LlmSettings, endpoints: Sequence[Endpoint], seed: int) -> dict[str, Any]:
    """Return the settings with their defaults, the endpoints by host and model, and the digest of the prompts.

    The digest is of a request for call 0 without its model: equal digests mean equal system prompt, brief, rules,
    examples, schema and sampling, and the same first draw of seeds.
    """
    body = Prompter(settings, seed).body("", 0, settings.batch_size, structured=False)
    hosts = {(one.name, urlsplit(one.shown_url).netloc, one.model): None for one in endpoints}
    told = {
        "recipe": settings.recipe.name, "row_kind": settings.row_kind, "rows": settings.rows,
        "batch_size": settings.batch_size, "temperature": settings.temperature, "max_tokens": settings.max_tokens,
        "request_timeout_seconds": settings.timeout_seconds, "quota_policy": settings.quota_policy,
        "max_wait_seconds": settings.max_wait_seconds, "max_candidates_ratio": settings.max_candidates_ratio,
        "max_cost_usd": settings.max_cost_usd, "language": settings.language, "forbid": sorted(settings.forbid),
        "seed": seed, "topics": len(settings.topics), "personas": len(settings.personas),
        "styles": len(settings.styles), "few_shots": len(settings.few_shots),
        "system_prompt": settings.system_prompt or settings.recipe.system_prompt, "rules": settings.rules,
        "item_schema": dict(settings.recipe.item_schema),
        "prompt_digest": f"sha256:{hashlib.sha256(body).hexdigest()}",
        "endpoints": [{"name": name, "host": host, "model": model} for name, host, model in hosts],
    }  # fmt: skip
    if settings.texts is not None:
        told["texts"] = {"count": len(settings.texts), "left_out": settings.texts.left_out,
                         "digest": f"sha256:{settings.texts.digest}"}  # fmt: skip
    return told
