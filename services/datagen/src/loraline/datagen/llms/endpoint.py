"""Endpoints: where they are, from the environment, and whether they work.

Keys are read here, in the process that uses them, and go nowhere else: not into a job, a log, a ledger or an error.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import openai

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import LoralineError, failed_precondition, not_found
from loraline.datagen.llms.failures import (
    QuotaReached,
    failure_of,
    no_endpoint,
    no_model,
    quota_error,
    unreachable,
)

NO_LIST = frozenset({404, 405, 501})
"""What endpoints answer that have no /v1/models."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint with one of its keys. The key never shows in its text form.

    `prices` are US dollars for a million tokens in and out, None when they are not configured.
    """

    name: str
    base_url: str
    model: str
    api_key: str = field(repr=False)
    prices: tuple[float, float] | None = None
    key_number: int = 1
    lists_models: bool = True
    """Whether it is asked for its models before a run."""

    @property
    def shown_url(self) -> str:
        """The address without a user and password that it may carry."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    @property
    def place(self) -> tuple[str, str]:
        """What gives the same answers: the address and the model, whichever key pays."""
        return self.shown_url, self.model

    @property
    def limit_key(self) -> str:
        """What shares one limit: the address, the model, and which of the keys."""
        return f"{self.shown_url} {self.model} {self.key_number}"

    def client(self, timeout_seconds: float) -> openai.AsyncOpenAI:
        """Return a client that never retries by itself: the quota policy must see every refusal."""
        return openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=timeout_seconds, max_retries=0
        )  # fmt: skip


def from_environment(name: str = "", model: str = "", environ: Mapping[str, str] | None = None) -> Endpoint:
    """Return the endpoint of that name with its first key; as `all_from_environment`."""
    return all_from_environment(name, model, environ)[0]


def all_from_environment(name: str = "", model: str = "", environ: Mapping[str, str] | None = None) -> list[Endpoint]:
    """Return the endpoint of that name once for each of its keys.

    `LLM_BASE_URL`, `LLM_MODEL`, and `LLM_API_KEY` (several: separated by commas) or `LLM_API_KEY_FILE` (several: one a
    line); prices in `LLM_PRICE_INPUT` and `LLM_PRICE_OUTPUT`, US dollars for a million tokens; `LLM_PROBE=off` for an
    endpoint that is not to be asked for its models before a run. A named endpoint has its name in the variables: `fast`
    has `LLM_FAST_BASE_URL` and so on. NOT_FOUND when the address is missing.
    """
    environ = os.environ if environ is None else environ
    prefix = f"LLM_{re.sub('[^A-Z0-9]', '_', name.upper())}_" if name else "LLM_"
    base_url = environ.get(f"{prefix}BASE_URL", "").strip().rstrip("/")
    if not re.match(r"https?://[^/\s]", base_url):
        raise not_found(
            "ENDPOINT_NOT_CONFIGURED",
            f"There is no endpoint {name or '(default)'}: set {prefix}BASE_URL (http:// or https://), {prefix}API_KEY "
            f"or {prefix}API_KEY_FILE, and {prefix}MODEL in the environment of the datagen service.",
            endpoint=name or "default",
        )
    model = model or environ.get(f"{prefix}MODEL", "")
    prices, lists = _prices(prefix, environ), _lists_models(prefix, environ)
    return [
        Endpoint(name or "default", base_url, model, key, prices, number, lists)
        for number, key in enumerate(_keys(prefix, environ), start=1)
    ]


def endpoints_of(recipe: datagen_pb2.LlmRecipe) -> list[Endpoint]:
    """Return a recipe's endpoints with all their keys, in order of preference.

    Typed errors when one, or its model, is not configured.
    """
    named = list(recipe.endpoints) or [datagen_pb2.LlmEndpoint()]
    endpoints = [endpoint for one in named for endpoint in all_from_environment(one.name, one.model)]
    for endpoint in endpoints:
        if not endpoint.model:
            raise model_not_set(endpoint, [])
    return endpoints


def _keys(prefix: str, environ: Mapping[str, str]) -> list[str]:
    path, told = environ.get(f"{prefix}API_KEY_FILE", ""), environ.get(f"{prefix}API_KEY", "")
    if path:
        try:
            told = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise failed_precondition(
                "ENDPOINT_KEY_UNREADABLE", f"The file that {prefix}API_KEY_FILE names cannot be read. Mend its "
                "permissions for the user of the datagen service.",
            ) from error  # fmt: skip
    keys = list(dict.fromkeys(key.strip() for key in re.split(r"[,\r\n]", told) if key.strip()))
    if any(not key.isprintable() or not key.isascii() for key in keys):
        raise failed_precondition(
            "ENDPOINT_KEY_UNREADABLE", f"{prefix}API_KEY or its file holds characters that no key has. Write the key "
            "as plain text, one a line.",
        )  # fmt: skip
    # Many local servers take any key, and the client refuses to start with none.
    return keys or ["none"]


def _lists_models(prefix: str, environ: Mapping[str, str]) -> bool:
    told = environ.get(f"{prefix}PROBE", "").strip().lower()
    if told not in {"", "on", "off"}:
        raise failed_precondition("ENDPOINT_PROBE_INVALID", f"{prefix}PROBE is {told!r}; set it to on or off.")
    return told != "off"


def _prices(prefix: str, environ: Mapping[str, str]) -> tuple[float, float] | None:
    told = [environ.get(f"{prefix}PRICE_{side}", "").strip() for side in ("INPUT", "OUTPUT")]
    if not any(told):
        return None
    try:
        prices = float(told[0] or 0), float(told[1] or 0)
    except ValueError:
        prices = (-1.0, -1.0)
    if not all(0 <= price < float("inf") for price in prices):
        raise failed_precondition(
            "ENDPOINT_PRICE_INVALID", f"{prefix}PRICE_INPUT and {prefix}PRICE_OUTPUT must be US dollars for a million "
            "tokens, such as 0.15.",
        )  # fmt: skip
    return prices


async def probe(endpoint: Endpoint, timeout_seconds: float = 15.0) -> tuple[list[str], float]:
    """Return the models the endpoint lists and the seconds it took; a typed error says what is wrong.

    One that has no list (404, 405, 501) is asked for a chat of one token instead, and lists none.
    """
    started = time.monotonic()
    async with endpoint.client(timeout_seconds) as client:
        try:
            models = await _listed(client, endpoint)
        except openai.APITimeoutError as error:
            raise unreachable(endpoint, f"no answer in {timeout_seconds:g} seconds") from error
        except openai.APIConnectionError as error:
            raise unreachable(endpoint, _cause(error)) from error
        except openai.APIStatusError as error:
            failure = failure_of(error.status_code, error.response.headers, error.response.content, endpoint)
            raise _final(failure, endpoint) from error
        except (openai.APIError, ValueError, AttributeError, TypeError) as error:
            raise no_endpoint(endpoint, "its list of models cannot be read") from error
    if not endpoint.model:
        raise model_not_set(endpoint, models)
    if models and endpoint.model not in models and f"models/{endpoint.model}" not in models:
        raise no_model(endpoint, models)
    return models, time.monotonic() - started


async def _listed(client: openai.AsyncOpenAI, endpoint: Endpoint) -> list[str]:
    try:
        return [str(model.id) for model in (await client.models.list()).data or []]
    except openai.APIStatusError as error:
        if error.status_code not in NO_LIST or not endpoint.model:
            raise
    chat = {"model": endpoint.model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
    with suppress(openai.BadRequestError, openai.UnprocessableEntityError):  # It reads chats, if not this one.
        await client.post("/chat/completions", body=chat, cast_to=httpx.Response)
    return []


def model_not_set(endpoint: Endpoint, models: list[str]) -> LoralineError:
    """Return the error of an endpoint for which nobody names a model."""
    there = f"; it lists {', '.join(models[:10])}" if models else ""
    return failed_precondition(
        "ENDPOINT_MODEL_NOT_SET", f"No model is named for the endpoint {endpoint.name}. Set LLM_MODEL in the "
        f"environment of the datagen service, or `model` in the request{there}.", endpoint=endpoint.name,
    )  # fmt: skip


def _cause(error: openai.APIConnectionError) -> str:
    return f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)


def _final(failure: Exception, endpoint: Endpoint) -> LoralineError:
    if isinstance(failure, LoralineError):
        return failure
    if isinstance(failure, QuotaReached):
        return quota_error(failure.notice, endpoint)
    return unreachable(endpoint, str(failure) or "no answer in time")
