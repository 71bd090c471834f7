"""One chat request and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.failures import failure_of, no_endpoint
from loraline.datagen.llms.transport import Transport


@dataclass(frozen=True)
class Answer:
    """What the endpoint answered; `cost` is in US dollars, None when neither it nor the configuration tells."""

    content: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


async def ask(transport: Transport, endpoint: Endpoint, payload: bytes) -> Answer:
    """Send one chat request.

    QuotaReached, TimedOut, Overloaded, BadRequest and Filtered are for the caller to act on; a LoralineError is final.
    """
    reply = await transport.send(payload)
    if reply.status != 200:
        raise failure_of(reply.status, reply.headers, reply.content, endpoint)
    try:
        body = json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        raise no_endpoint(endpoint, "its answer is not JSON of a chat completion") from error
    try:
        return _answer(body, endpoint)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise failure_of(200, reply.headers, body, endpoint) from error


def _answer(body: Mapping[str, Any], endpoint: Endpoint) -> Answer:
    choice = body["choices"][0]
    usage = body.get("usage") or {}
    tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    told, cost = usage.get("cost"), None
    if isinstance(told, int | float):
        cost = float(told)
    elif endpoint.prices is not None:
        cost = (tokens[0] * endpoint.prices[0] + tokens[1] * endpoint.prices[1]) / 1e6
    return Answer(
        _text(choice["message"].get("content")), str(choice.get("finish_reason") or ""),
        str(body.get("model") or endpoint.model), *tokens, cost,
    )  # fmt: skip


def _text(content: Any) -> str:
    if isinstance(content, list):  # some gateways send parts
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)
