"""How long a provider says to wait: headers, fields of the error and words, in the order of how exact they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

LONGEST_SECONDS = 366 * 86400.0
"""What is longer is no wait but a mistake of the provider, and is passed over."""
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|h|m|s)")
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
UNIT = r"(?:ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?|d|days?)\b"
IN_WORDS = re.compile(
    rf"(?:retry|try again|reset|wait)\w*\s+(?:(?:in|after|for)\s+)?((?:\d+(?:\.\d+)?\s*{UNIT}[\s,]*(?:and\s+)?)+"
    r"|(?:\d+(?:\.\d+)?(?:ms|[smhd]))+)", re.IGNORECASE,
)  # fmt: skip
WORD_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|millisecond|s|m|h|d)", re.IGNORECASE)
WORD_SECONDS = {"ms": 1e-3, "millisecond": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
ON_A_DAY = re.compile(r"regain access on (\d{4}-\d\d-\d\d)(?: at (\d\d:\d\d))? UTC", re.IGNORECASE)
RESET_HEADER = re.compile(r"x-ratelimit-reset(-.*)?|anthropic-ratelimit-.*-reset")


def told_wait(headers: Mapping[str, str], error: Mapping[str, Any], message: str, now: datetime) -> float | None:
    """Return the seconds to wait that a response tells of, or None. A moment that has passed is a wait of 0."""
    lower = {str(name).lower(): str(value) for name, value in _inner_headers(error).items()}
    lower.update({name.lower(): value for name, value in headers.items()})
    for seconds in _in_order(lower, error, message, now):
        if seconds is not None and math.isfinite(seconds) and 0 <= seconds <= LONGEST_SECONDS:
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
        yield from (_duration(value) for value in values_of(error, name))
    yield from (_moment(value, now) for value in values_of(error, "quotaResetTimeStamp"))
    for name in ("reset_seconds", "resets_in_seconds"):
        yield from (_number(value) for value in values_of(error, name))
    for name in ("resets_at", "reset_time"):
        yield from (_duration_or_moment(value, now) for value in values_of(error, name))
    resets = (_duration_or_moment(value, now) for name, value in headers.items() if RESET_HEADER.fullmatch(name))
    yield max((seconds for seconds in resets if seconds is not None and seconds >= 0), default=None)
    match = IN_WORDS.search(message)
    yield _from_words(match[1]) if match else None
    day = ON_A_DAY.search(message)
    yield _moment(f"{day[1]}T{day[2] or '00:00'}+00:00", now) if day else None


def go_duration(text: str) -> float | None:
    """Return the seconds of a Go or protobuf duration such as `127h33m21s` or `479.4ms`; None if it is none."""
    parts = DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def values_of(tree: Any, name: str) -> Iterator[Any]:
    """Yield every value under this name, anywhere in a tree of JSON values."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == name:
                yield value
            else:
                yield from values_of(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, name)


def _inner_headers(error: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return headers that a gateway put into the body (OpenRouter: `metadata.headers`)."""
    found = next((value for value in values_of(error, "headers") if isinstance(value, Mapping)), {})
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}


def _from_words(text: str) -> float:
    return sum(float(number) * WORD_SECONDS[unit.lower()] for number, unit in WORD_PART.findall(text))


def _duration(value: Any) -> float | None:
    if isinstance(value, Mapping):
        return (_number(value.get("seconds", 0)) or 0.0) + (_number(value.get("nanos", 0), 1e-9) or 0.0)
    seconds = go_duration(str(value))
    return seconds if seconds is not None else _number(value)


def _duration_or_moment(value: Any, now: datetime) -> float | None:
    seconds = go_duration(str(value))
    return seconds if seconds is not None else _moment(value, now)


def _number(value: Any, factor: float = 1.0) -> float | None:
    try:
        return float(value) * factor
    except (TypeError, ValueError):
        return None


def _http_date(value: str | None, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(value or "")
    except (TypeError, ValueError, IndexError):
        return None
    return _until(moment, now)


def _moment(value: Any, now: datetime) -> float | None:
    """Return the seconds until a moment: RFC 3339, an epoch in seconds or milliseconds; small numbers are seconds."""
    number = _number(value)
    if number is not None:
        seconds = number / 1000 if number > 1e11 else number
        return max(0.0, seconds - now.timestamp()) if seconds > 1e9 else number
    try:
        return _until(datetime.fromisoformat(str(value)), now)
    except ValueError:
        return None


def _until(moment: datetime, now: datetime) -> float:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - now).total_seconds())
