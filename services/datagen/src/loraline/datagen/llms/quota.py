"""What a provider says about limits: what kind of limit was hit, whether waiting is any use, and for how long.

Providers say it in a dozen ways: status codes, codes in the body, arrays of one error, errors inside a 200.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from loraline.datagen.llms.waits import told_wait, values_of

Kind = Literal["rate", "overloaded", "quota", "cooldown", "spend"]

SPEND = (
    "insufficient_quota", "credit_balance_exhausted", "spend_limit_exceeded", "organization_usage_limit_exceeded",
    "billing_hard_limit_reached", "billing_error", "credit balance", "insufficient credits", "usage limits",
    "spending cap", "spend cap",
)  # fmt: skip
QUOTA = ("quota_exhausted", "resource_exhausted", "quota exceeded", "quota_exceeded")
OVERLOADED = ("is_overloaded", "is overloaded", "overloaded_error", "engine_overloaded", "saturated", "饱和")
RATE = ("rate_limit", "rate limit", "too_many_requests", "too many requests", "slow_down")
NOT_ACCEPTED = (400, 413, 422)
SAID_LENGTH = 300


@dataclass(frozen=True)
class QuotaNotice:
    """A limit that was hit: its kind, the provider's words, the wait in seconds if told, and the quota's id.

    `rate`: too fast for the moment. `overloaded`: the provider is at its limit, not we. `quota`: a quota of the
    provider's own accounting. `cooldown`: a gateway locked the model. `spend`: money or an account's cap.
    """

    kind: Kind
    message: str
    wait_seconds: float | None = None
    quota_id: str = ""
    used_up: bool = False

    @property
    def exhausted(self) -> bool:
        """Whether going slower is no use: the day's, the money's or the account's limit, or a locked model."""
        return self.used_up or self.kind in ("spend", "cooldown")

    @property
    def reason(self) -> str:
        """The stable reason for people: QUOTA_EXHAUSTED, MODEL_COOLDOWN or RATE_LIMITED."""
        if self.kind == "cooldown":
            return "MODEL_COOLDOWN"
        return "QUOTA_EXHAUSTED" if self.exhausted or self.kind == "quota" else "RATE_LIMITED"


def read_notice(status: int, headers: Mapping[str, str], body: Any, now: datetime | None = None) -> QuotaNotice | None:
    """Return the limit that a response tells of, or None when it is about something else.

    `body` is the decoded JSON (object or list of one) or text. Status 200 with an error inside counts, too.
    """
    error = error_of(body)
    if not error and status < 400:
        return None
    codes = " ".join(str(error.get(name, "")) for name in ("code", "type", "status")).lower()
    words = f"{codes} {error.get('message', '')} {error.get('raw', '')}".lower()
    if status in NOT_ACCEPTED and not any(word in words for word in SPEND):
        # The message of a request that was not accepted may quote the request: only money is told there.
        words = codes
    if status < 400:
        status = _inner_status(error)
    quota_id = next((str(found) for found in values_of(error, "quotaId")), "")
    kind = _kind(status, words, quota_id)
    if kind is None:
        return None
    message = str(error.get("message") or error.get("code") or "the endpoint's limit was reached")
    wait = told_wait(headers, error, f"{message} {error.get('raw', '')}", now or datetime.now(UTC))
    daily = "perday" in quota_id.lower().replace("_", "")
    return QuotaNotice(kind, message.strip()[:SAID_LENGTH], wait, quota_id, daily or "quota_exhausted" in words)


def _kind(status: int, words: str, quota_id: str) -> Kind | None:
    if "model_cooldown" in words:
        return "cooldown"
    if status == 402 or any(word in words for word in SPEND):
        return "spend"
    if quota_id or any(word in words for word in QUOTA):
        return "quota"
    if status == 529 or any(word in words for word in OVERLOADED):
        return "overloaded"
    if status == 429 or any(word in words for word in RATE):
        return "quota" if "quota" in words else "rate"
    return None


def _inner_status(error: Mapping[str, Any]) -> int:
    code = error.get("code", 0)
    return int(code) if str(code).isdigit() else 0


def error_of(body: Any) -> dict[str, Any]:
    """Return the error object of a body in any of its wrappings; empty when there is none.

    An error that a gateway passes on as text inside its own message is found under `passed_on`.
    """
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            return {"message": body[:SAID_LENGTH]} if body.strip() else {}
    if isinstance(body, list):
        body = body[0] if body else {}
    if not isinstance(body, Mapping):
        return {}
    inner = body.get("error", body)
    if not inner:
        return {}
    error = dict(inner) if isinstance(inner, Mapping) else {"message": str(inner)}
    passed_on = _passed_on(error)
    return {**error, "passed_on": passed_on, "raw": json.dumps(passed_on)} if passed_on else error


def _passed_on(error: Mapping[str, Any]) -> dict[str, Any]:
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    for text in (raw, error.get("message")):
        if isinstance(text, str) and text.lstrip()[:1] in ("{", "["):
            try:
                json.loads(text)
            except (ValueError, RecursionError):
                continue
            return error_of(text)
        if isinstance(raw, Mapping):
            return error_of(raw)
    return {}
