"""What an endpoint answers when it does not answer: from status, headers and body to an error with a remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import grpc

from loraline.core.errors import LoralineError, failed_precondition, unavailable
from loraline.datagen.llms.quota import NOT_ACCEPTED, QuotaNotice, error_of, read_notice

if TYPE_CHECKING:
    from loraline.datagen.llms.endpoint import Endpoint

FILTERED = (
    "content_filter", "content management policy", "responsibleaipolicyviolation", "content_policy_violation",
    "requires moderation", "was flagged", "flagged_input",
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


class Filtered(Exception):
    """The provider refuses this one request for its content."""


def failure_of(status: int, headers: Mapping[str, str], body: Any, endpoint: Endpoint) -> Exception:
    """Return the error of a response that holds no answer; some gateways send theirs with status 200.

    A LoralineError is final; the others are for the caller to act on.
    """
    notice = read_notice(status, headers, body)
    if notice is not None and status not in (401, 404, 407):
        return QuotaReached(notice)
    error = error_of(body)
    said = str(error.get("message") or error.get("detail") or error.get("code") or f"HTTP {status}")[:300].strip()
    if status < 400:
        whole = body[0] if isinstance(body, list) and body else body
        told = isinstance(whole, Mapping) and whole.get("error")
        return Overloaded(said) if told else no_endpoint(endpoint, "its answer holds no choices")
    filtered = _is_filtered(said, error)
    if status in NOT_ACCEPTED or (status == 403 and filtered):
        return Filtered(said) if filtered else BadRequest(said)
    if status in (408, 504):
        return TimedOut()
    if status >= 500:
        return Overloaded(f"HTTP {status}: {said}")
    return _refused(status, said, endpoint)


def _is_filtered(said: str, error: Mapping[str, Any]) -> bool:
    words = f"{said} {error.get('code', '')} {error.get('innererror', '')} {error.get('metadata', '')}".lower()
    return any(word in words for word in FILTERED)


def _refused(status: int, said: str, endpoint: Endpoint) -> LoralineError:
    metadata = {"endpoint": endpoint.name, "base_url": endpoint.shown_url}
    if status == 407:
        return proxy_failed(endpoint, "the proxy asks for a user and password (HTTP 407)")
    if status in (401, 403):
        return failed_precondition(
            "ENDPOINT_KEY_REFUSED",
            f"The endpoint {endpoint.name} refuses the key (HTTP {status}). Put a valid one into its LLM_…API_KEY or "
            "LLM_…API_KEY_FILE.", **metadata,
        )  # fmt: skip
    if status == 404 and "model" in said.lower():
        return no_model(endpoint, [])
    if status == 404 or status < 400:
        return no_endpoint(endpoint, f"HTTP {status}")
    return failed_precondition(
        "ENDPOINT_REFUSED", f"The endpoint {endpoint.name} refuses the request (HTTP {status}): {said}.", **metadata
    )


def no_endpoint(endpoint: Endpoint, why: str) -> LoralineError:
    """Return the error of an address that is no OpenAI-compatible endpoint."""
    return failed_precondition(
        "ENDPOINT_NOT_FOUND",
        f"{endpoint.shown_url} is no OpenAI-compatible endpoint: {why}. The base URL usually ends in /v1.",
        endpoint=endpoint.name, base_url=endpoint.shown_url,
    )  # fmt: skip


def no_model(endpoint: Endpoint, models: list[str]) -> LoralineError:
    """Return the error of an endpoint that does not have the model."""
    there = f" It lists {', '.join(models[:10])}." if models else ""
    return failed_precondition(
        "ENDPOINT_MODEL_NOT_FOUND",
        f"The endpoint {endpoint.name} does not have the model {endpoint.model!r}.{there} Set LLM_MODEL, or `model` "
        "in the request.", endpoint=endpoint.name, model=endpoint.model,
    )  # fmt: skip


def unreachable(endpoint: Endpoint, why: str) -> LoralineError:
    """Return the error of an endpoint that does not answer; when a proxy is in between, it may be the one to blame."""
    if proxy_of(endpoint.base_url):
        return proxy_failed(endpoint, why)
    return unavailable(
        "ENDPOINT_UNREACHABLE",
        f"The endpoint {endpoint.name} at {endpoint.shown_url} does not answer: {why}. Check the address, the network "
        "and the proxy settings (HTTPS_PROXY, NO_PROXY) of the datagen service.",
        endpoint=endpoint.name, base_url=endpoint.shown_url,
    )  # fmt: skip


def proxy_failed(endpoint: Endpoint, why: str) -> LoralineError:
    """Return the error of an endpoint that is asked through a proxy, which does not let it through."""
    return unavailable(
        "ENDPOINT_PROXY",
        f"The endpoint {endpoint.name} at {endpoint.shown_url} cannot be reached through the proxy that the datagen "
        f"service's environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY): {why}. Correct the proxy, or list the "
        "endpoint's host in NO_PROXY.", endpoint=endpoint.name, base_url=endpoint.shown_url,
    )  # fmt: skip


def proxy_of(url: str) -> str:
    """Return the proxy that the environment sets for this URL, or nothing."""
    parts = urlsplit(url)
    if not any(name.lower().endswith("_proxy") for name in os.environ) or proxy_bypass(parts.netloc):
        return ""
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all") or ""


def quota_error(notice: QuotaNotice, endpoint: Endpoint) -> LoralineError:
    """Return the error of a limit outside a job, where nothing can be paused."""
    wait = timedelta(seconds=notice.wait_seconds) if notice.wait_seconds is not None else None
    return LoralineError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, notice.reason,
        f"The endpoint {endpoint.name} has reached its limit: {notice.message}", retry_after=wait,
        quota={notice.quota_id or endpoint.name: notice.message}, metadata={"endpoint": endpoint.name},
    )  # fmt: skip
