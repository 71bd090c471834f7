"""What a provider says about limits: whether to wait, how long, and what is exhausted.

Providers say it in a dozen ways; this reads the ones that are known, in the order of how exact they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

EXHAUSTED = (
    "insufficient_quota", "credit_balance_exhausted", "spend_limit_exceeded", "organization_usage_limit_exceeded",
    "quota_exhausted", "billing_hard_limit_reached", "model_cooldown",
)  # fmt: skip
LIMITED = ("resource_exhausted", "rate_limit", "too_many_requests", "slow_down", "quota")
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|h|m|s)")
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
IN_WORDS = re.compile(
    r"(?:retry|try again|reset)\w*\s+(?:in|after)\s+((?:\d+(?:\.\d+)?\s*(?:ms|milliseconds?|s|secs?|seconds?|m|"
    r"minutes?|h|hours?)\s*)+)", re.IGNORECASE,
)  # fmt: skip
WORD_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|millisecond|s|m|h)", re.IGNORECASE)
RESET_HEADERS = (
    "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens", "x-ratelimit-reset",
    "anthropic-ratelimit-requests-reset", "anthropic-ratelimit-tokens-reset",
)  # fmt: skip


@dataclass(frozen=True)
class QuotaNotice:
    """A limit that was hit: its stable reason, the provider's words, the wait in seconds if told, the quota's id."""

    reason: str
    message: str
    wait_seconds: float | None = None
    quota_id: str = ""

    @property
    def exhausted(self) -> bool:
        """Whether short waiting is no use: the day's, the money's or the account's limit."""
        return self.reason == "EXHAUSTED" or "perday" in self.quota_id.lower().replace("_", "")


def read_notice(status: int, headers: Mapping[str, str], body: Any, now: datetime | None = None) -> QuotaNotice | None:
    """Return the limit that a response tells of, or None when it is about something else.

    `body` is the decoded JSON (object or list of one) or text. Status 200 with an error inside counts, too.
    """
    error = _error_of(body)
    words = " ".join(str(error.get(name, "")) for name in ("code", "type", "status", "message")).lower()
    quota_id = next((str(found) for found in _values(error, "quotaId")), "")
    exhausted = any(word in words for word in EXHAUSTED)
    limited = status == 429 or any(word in words for word in LIMITED)
    if not (exhausted or limited):
        return None
    message = str(error.get("message") or error.get("code") or "the endpoint's limit was reached")
    wait = told_wait(headers, error, message, now or datetime.now(UTC))
    return QuotaNotice("EXHAUSTED" if exhausted else "LIMITED", message, wait, quota_id)


def told_wait(headers: Mapping[str, str], error: Mapping[str, Any], message: str, now: datetime) -> float | None:
    """Return the seconds to wait that the response tells of, or None."""
    lower = {name.lower(): value for name, value in headers.items()}
    for seconds in _in_order(lower, error, message, now):
        if seconds is not None and seconds >= 0:
            return seconds
    return None


def _in_order(
    headers: Mapping[str, str], error: Mapping[str, Any], message: str, now: datetime
) -> Iterator[float | None]:
    yield _number(headers.get("retry-after-ms"), 1e-3)
    retry_after = headers.get("retry-after")
    yield _number(retry_after)
    yield _http_date(retry_after, now)
    for name in ("retryDelay", "quotaResetDelay"):
        yield from (go_duration(str(value)) for value in _values(error, name))
    for name in ("quotaResetTimeStamp",):
        yield from (_moment(value, now) for value in _values(error, name))
    for name in ("reset_seconds", "resets_in_seconds"):
        yield from (_number(value) for value in _values(error, name))
    for name in ("resets_at", "reset_time"):
        yield from (go_duration(str(value)) if go_duration(str(value)) is not None else _moment(value, now)
                    for value in _values(error, name))  # fmt: skip
    resets = [seconds for name in RESET_HEADERS if (seconds := _reset_header(headers.get(name), now)) is not None]
    yield max(resets) if resets else None
    match = IN_WORDS.search(message)
    yield _from_words(match[1]) if match else None


def go_duration(text: str) -> float | None:
    """Return the seconds of a Go or protobuf duration such as `127h33m21s` or `479.4ms`; None if it is none."""
    parts = DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def _from_words(text: str) -> float:
    units = {"ms": 1e-3, "millisecond": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    return sum(float(number) * units[unit.lower()] for number, unit in WORD_PART.findall(text))


def _number(value: Any, factor: float = 1.0) -> float | None:
    try:
        return float(value) * factor
    except (TypeError, ValueError):
        return None


def _http_date(value: str | None, now: datetime) -> float | None:
    try:
        return max(0.0, (parsedate_to_datetime(str(value)) - now).total_seconds()) if value else None
    except (TypeError, ValueError):
        return None


def _moment(value: Any, now: datetime) -> float | None:
    """Return the seconds until a moment: RFC 3339, or an epoch in seconds or milliseconds."""
    number = _number(value)
    if number is not None:
        seconds = number / 1000 if number > 1e11 else number
        return max(0.0, seconds - now.timestamp()) if seconds > 1e9 else number
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now.timestamp())


def _reset_header(value: str | None, now: datetime) -> float | None:
    if not value:
        return None
    seconds = go_duration(value)
    return seconds if seconds is not None else _moment(value, now)


def _error_of(body: Any) -> dict[str, Any]:
    """Return the error object of a body in any of its wrappings."""
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return {"message": body[:500]}
    if isinstance(body, list):
        body = body[0] if body else {}
    if not isinstance(body, Mapping):
        return {}
    inner = body.get("error", body)
    return dict(inner) if isinstance(inner, Mapping) else {"message": str(inner)}


def _values(tree: Any, name: str) -> Iterator[Any]:
    """Yield every value under this name, anywhere in the tree."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == name:
                yield value
            else:
                yield from _values(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, name)
