"""Endpoints: where they are, from the environment; asking one; every failure as a typed error.

Keys are read here, in the process that uses them, and go nowhere else: not into a job, a log, a ledger or an error.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import openai

from loraline.core.errors import LoralineError, failed_precondition, not_found, unavailable
from loraline.datagen.llms.quota import QuotaNotice, read_notice


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. The key never shows in its text form."""

    name: str
    base_url: str
    model: str
    api_key: str = field(repr=False)

    @property
    def shown_url(self) -> str:
        """The address without a user and password that it may carry."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    def client(self, timeout_seconds: float) -> openai.AsyncOpenAI:
        """Return a client that never retries by itself: the quota policy must see every refusal."""
        return openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=timeout_seconds, max_retries=0
        )  # fmt: skip


class QuotaReached(Exception):
    """The endpoint refused because of a limit."""

    def __init__(self, notice: QuotaNotice):
        super().__init__(notice.message)
        self.notice = notice


class TimedOut(Exception):
    """The endpoint did not answer in time."""


class Overloaded(Exception):
    """The endpoint failed in a way that may pass: 5xx, or the connection broke."""


class BadRequest(Exception):
    """The endpoint did not accept the request's form (400, 422)."""


def from_environment(name: str = "", model: str = "", environ: Mapping[str, str] | None = None) -> Endpoint:
    """Return the endpoint of that name: `LLM_BASE_URL`, `LLM_API_KEY` or `LLM_API_KEY_FILE`, and `LLM_MODEL`.

    A named endpoint has its name in the variables: `fast` has `LLM_FAST_BASE_URL` and so on. NOT_FOUND when the
    variables are missing.
    """
    environ = os.environ if environ is None else environ
    prefix = f"LLM_{re.sub('[^A-Z0-9]', '_', name.upper())}_" if name else "LLM_"
    base_url = environ.get(f"{prefix}BASE_URL", "").rstrip("/")
    if not base_url:
        raise not_found(
            "ENDPOINT_NOT_CONFIGURED",
            f"There is no endpoint {name or '(default)'}: set {prefix}BASE_URL, {prefix}API_KEY or "
            f"{prefix}API_KEY_FILE, and {prefix}MODEL in the environment of the datagen service.",
            endpoint=name or "default",
        )
    model = model or environ.get(f"{prefix}MODEL", "")
    return Endpoint(name or "default", base_url, model, _key(prefix, environ))


def _key(prefix: str, environ: Mapping[str, str]) -> str:
    path = environ.get(f"{prefix}API_KEY_FILE", "")
    if path:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise failed_precondition(
                "ENDPOINT_KEY_UNREADABLE", f"The file that {prefix}API_KEY_FILE names cannot be read. Mend its "
                "permissions for the user of the datagen service.",
            ) from error  # fmt: skip
    # Many local servers take any key, and the client refuses to start with none.
    return environ.get(f"{prefix}API_KEY", "") or "none"


@dataclass(frozen=True)
class Answer:
    """What the endpoint answered."""

    content: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int


async def ask(client: openai.AsyncOpenAI, endpoint: Endpoint, payload: Mapping[str, Any]) -> Answer:
    """Send one chat request.

    QuotaReached, TimedOut, Overloaded and BadRequest are for the caller to act on; a LoralineError is final.
    """
    try:
        response = await client.chat.completions.create(**dict(payload))
    except openai.APITimeoutError as error:
        raise TimedOut from error
    except openai.APIConnectionError as error:
        raise Overloaded(_cause(error)) from error
    except openai.APIStatusError as error:
        raise _status_error(error, endpoint) from error
    except (openai.APIResponseValidationError, ValueError) as error:
        raise _no_endpoint(endpoint, "its answer is not JSON of a chat completion") from error
    if not getattr(response, "choices", None):
        raise _without_choices(response, endpoint)
    choice, usage = response.choices[0], response.usage
    return Answer(
        choice.message.content or "", choice.finish_reason or "", response.model or endpoint.model,
        usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0,
    )  # fmt: skip


def _without_choices(response: Any, endpoint: Endpoint) -> Exception:
    """Return the error of a 200 that holds no answer; some gateways put errors there."""
    body = response.model_dump() if hasattr(response, "model_dump") else {"message": str(response)[:300]}
    notice = read_notice(200, {}, body)
    if notice is not None:
        return QuotaReached(notice)
    if isinstance(body, dict) and body.get("error"):
        return Overloaded(str(body["error"])[:300])
    return _no_endpoint(endpoint, "its answer holds no choices")


def _status_error(error: openai.APIStatusError, endpoint: Endpoint) -> Exception:
    status, body = error.status_code, error.body if error.body is not None else error.response.text
    notice = read_notice(status, error.response.headers, body)
    if notice is not None and status not in (401, 404):
        return QuotaReached(notice)
    if status in (400, 413, 422):
        return BadRequest(_said(error))
    if status >= 500:
        return Overloaded(f"HTTP {status}: {_said(error)}")
    return _refused(status, _said(error), endpoint)


def _refused(status: int, said: str, endpoint: Endpoint) -> LoralineError:
    metadata = {"endpoint": endpoint.name, "base_url": endpoint.shown_url}
    if status in (401, 403):
        return failed_precondition(
            "ENDPOINT_KEY_REFUSED",
            f"The endpoint {endpoint.name} refuses the key (HTTP {status}). Put a valid one into its LLM_…API_KEY or "
            "LLM_…API_KEY_FILE.", **metadata,
        )  # fmt: skip
    if status == 404 and "model" in said.lower():
        return _no_model(endpoint, [])
    if status == 404:
        return _no_endpoint(endpoint, "HTTP 404")
    return failed_precondition(
        "ENDPOINT_REFUSED", f"The endpoint {endpoint.name} refuses the request (HTTP {status}): {said}.", **metadata
    )


def _no_endpoint(endpoint: Endpoint, why: str) -> LoralineError:
    return failed_precondition(
        "ENDPOINT_NOT_FOUND",
        f"{endpoint.shown_url} is no OpenAI-compatible endpoint: {why}. The base URL usually ends in /v1.",
        endpoint=endpoint.name, base_url=endpoint.shown_url,
    )  # fmt: skip


def _no_model(endpoint: Endpoint, models: list[str]) -> LoralineError:
    there = f" It lists {', '.join(models[:10])}." if models else ""
    return failed_precondition(
        "ENDPOINT_MODEL_NOT_FOUND",
        f"The endpoint {endpoint.name} does not have the model {endpoint.model!r}.{there} Set LLM_MODEL, or `model` "
        "in the request.", endpoint=endpoint.name, model=endpoint.model,
    )  # fmt: skip


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = inner.get("message") if isinstance(inner, dict) else inner
    return str(text or error.response.text)[:300].strip() or f"HTTP {error.status_code}"


def _cause(error: openai.APIConnectionError) -> str:
    return f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)


def unreachable(endpoint: Endpoint, why: str) -> LoralineError:
    """Return the error of an endpoint that does not answer."""
    return unavailable(
        "ENDPOINT_UNREACHABLE",
        f"The endpoint {endpoint.name} at {endpoint.shown_url} does not answer: {why}. Check the address, the network "
        "and the proxy settings (HTTPS_PROXY, NO_PROXY) of the datagen service.",
        endpoint=endpoint.name, base_url=endpoint.shown_url,
    )  # fmt: skip


async def probe(endpoint: Endpoint, timeout_seconds: float = 15.0) -> tuple[list[str], float]:
    """Return the models the endpoint lists and the seconds it took; a typed error says what is wrong."""
    started = time.monotonic()
    async with endpoint.client(timeout_seconds) as client:
        try:
            listed = await client.models.list()
            models = [str(model.id) for model in listed.data or []]
        except openai.APITimeoutError as error:
            raise unreachable(endpoint, f"no answer in {timeout_seconds:g} seconds") from error
        except openai.APIConnectionError as error:
            raise unreachable(endpoint, _cause(error)) from error
        except openai.APIStatusError as error:
            failure = _status_error(error, endpoint)
            raise _final(failure, endpoint) from error
        except (openai.APIError, ValueError, AttributeError, TypeError) as error:
            raise _no_endpoint(endpoint, "its list of models cannot be read") from error
    if not endpoint.model:
        raise failed_precondition(
            "ENDPOINT_MODEL_NOT_SET", f"No model is named for the endpoint {endpoint.name}. Set LLM_MODEL, or `model` "
            f"in the request; it lists {', '.join(models[:10]) or 'none'}.", endpoint=endpoint.name,
        )  # fmt: skip
    if models and endpoint.model not in models and f"models/{endpoint.model}" not in models:
        raise _no_model(endpoint, models)
    return models, time.monotonic() - started


def _final(failure: Exception, endpoint: Endpoint) -> LoralineError:
    if isinstance(failure, LoralineError):
        return failure
    if isinstance(failure, QuotaReached):
        return quota_error(failure.notice, endpoint)
    return unreachable(endpoint, str(failure))


def quota_error(notice: QuotaNotice, endpoint: Endpoint) -> LoralineError:
    """Return the error of a limit outside a job, where nothing can be paused."""
    wait = timedelta(seconds=notice.wait_seconds) if notice.wait_seconds is not None else None
    return LoralineError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXHAUSTED",
        f"The endpoint {endpoint.name} has reached its limit: {notice.message}", retry_after=wait,
        quota={notice.quota_id or endpoint.name: notice.message}, metadata={"endpoint": endpoint.name},
    )  # fmt: skip
