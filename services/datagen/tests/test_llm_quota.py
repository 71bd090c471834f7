"""What providers say of limits: kinds and waits, in every form that is known."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from loraline.datagen.llms.quota import read_notice
from loraline.datagen.llms.waits import go_duration

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAILY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
GEMINI = {
    "error": {
        "code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Please retry in 36.429760048s.",
        "details": [
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": DAILY}]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36s"},
        ],
    }
}  # fmt: skip

COOLDOWN = {
    "error": {
        "code": "model_cooldown", "model": "toy", "reset_seconds": 459202, "reset_time": "127h33m21s",
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "headers", "body", "wait", "exhausted"),
    [
        (429, {}, GEMINI, 36.0, True),
        (429, {}, [GEMINI], 36.0, True),
        (429, {"Retry-After": "5"}, GEMINI, 5.0, True),
        (429, {"retry-after-ms": "1500", "retry-after": "9"}, {}, 1.5, False),
        (429, {"retry-after": "Thu, 01 Jan 2026 00:01:00 GMT"}, {}, 60.0, False),
        (
            429,
            {},
            {"error": {"code": "model_cooldown", "reset_seconds": 459202, "reset_time": "127h33m21s"}},
            459202,
            True,
        ),
        (429, {}, {"error": {"message": "x", "reset_time": "127h33m21s"}}, 459201.0, False),
        (429, {}, {"error": {"message": "x", "quotaResetDelay": "479.417207ms"}}, 0.479417207, False),
        (429, {}, {"error": {"message": "x", "quotaResetTimeStamp": "2026-01-01T00:00:30Z"}}, 30.0, False),
        (429, {}, {"error": {"message": "x", "resets_at": NOW.timestamp() + 7}}, 7.0, False),
        (429, {"x-ratelimit-reset-requests": "12ms", "x-ratelimit-reset-tokens": "6m0s"}, {}, 360.0, False),
        (429, {"x-ratelimit-reset": str(int(NOW.timestamp() * 1000) + 4000)}, {}, 4.0, False),
        (429, {}, {"error": {"message": "Please retry after 86400 seconds"}}, 86400.0, False),
        (429, {}, {"error": {"message": "Please try again in 1m30s."}}, 90.0, False),
        (429, {}, {"error": {"status": "RESOURCE_EXHAUSTED", "message": "QUOTA_EXHAUSTED"}}, None, True),
        (400, {}, {"error": {"code": "insufficient_quota", "message": "You exceeded your current quota"}}, None, True),
        (200, {}, {"error": {"code": 429, "message": "Rate limit exceeded: rate_limit"}}, None, False),
        (429, {}, "slow down", None, False),
    ],
)
def test_limits_as_providers_send_them(
    status: int, headers: dict[str, str], body: Any, wait: float | None, exhausted: bool
) -> None:
    notice = read_notice(status, headers, body, NOW)
    assert notice is not None
    assert notice.wait_seconds == pytest.approx(wait) if wait is not None else notice.wait_seconds is None
    assert notice.exhausted == exhausted


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "wait"),
    [
        # Gateways
        (429, {"Retry-After": "459202"}, COOLDOWN, "cooldown", 459202),
        (429, {}, {"error": {"status": "RESOURCE_EXHAUSTED", "message": "QUOTA_EXHAUSTED"}}, "quota", None),
        (429, {}, {"error": {"message": "x", "resets_in_seconds": 12}}, "rate", 12),
        (429, {}, {"error": {"code": 429, "type": "new_api_error", "message": "上游负载已饱和"}}, "overloaded", None),
        # OpenAI
        (429, {}, {"error": {"type": "insufficient_quota", "code": "credit_balance_exhausted"}}, "spend", None),
        (429, {}, {"error": {"code": "project_spend_limit_exceeded", "message": "x"}}, "spend", None),
        (429, {}, {"error": {"code": "organization_usage_limit_exceeded", "message": "x"}}, "spend", None),
        (429, {"x-ratelimit-reset-tokens": "6m0s"}, {"error": {"code": "rate_limit_exceeded"}}, "rate", 360),
        (503, {}, {"error": {"code": "slow_down", "message": "Slow down"}}, "rate", None),
        (503, {"retry-after": "3"}, {"error": {"code": "server_is_overloaded"}}, "overloaded", 3),
        # Azure
        (
            429, {"Retry-After": "86400", "x-ratelimit-remaining-requests": "-1"},
            {"error": {"code": "429", "message": "Please retry after 86400 seconds."}}, "rate", 86400,
        ),
        (429, {"x-ratelimit-reset-requests": "-1", "x-ratelimit-reset-tokens": "0"}, {}, "rate", 0),
        # Anthropic
        (429, {"retry-after": "7"}, {"type": "error", "error": {"type": "rate_limit_error"}}, "rate", 7),
        (
            429, {"anthropic-ratelimit-input-tokens-reset": "2026-01-01T00:00:09Z"},
            {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, "rate", 9,
        ),
        (529, {}, {"type": "error", "error": {"type": "overloaded_error", "message": "Full"}}, "overloaded", None),
        (
            400, {}, {"error": {"type": "invalid_request_error", "message": "You have reached your specified API usage "
             "limits. You will regain access on 2026-01-02 at 00:00 UTC."}}, "spend", 86400,
        ),
        (400, {}, {"error": {"message": "Your credit balance is too low to access the API."}}, "spend", None),
        # OpenRouter: epoch in milliseconds in headers inside the body, with HTTP 200
        (
            200, {}, {"choices": None, "error": {"code": 429, "message": "Provider returned error", "metadata": {
                "headers": {"X-RateLimit-Reset": str(int(NOW.timestamp() * 1000) + 5000)}}}}, "rate", 5,
        ),
        (402, {}, {"error": {"code": 402, "message": "Insufficient credits"}}, "spend", None),
        # An error passed on as text inside another one
        (429, {}, {"error": {"message": json.dumps(GEMINI)}}, "quota", 36),
        (429, {}, {"error": {"message": "x", "metadata": {"raw": json.dumps([GEMINI])}}}, "quota", 36),
        # Nonsense is passed over, never believed
        (429, {"Retry-After": "inf"}, {"error": {"message": "try again in 5s"}}, "rate", 5),
        (429, {"Retry-After": "nan"}, {}, "rate", None),
        (429, {"Retry-After": "-3"}, {}, "rate", None),
        (429, {"Retry-After": "99999999999"}, {}, "rate", None),
        (429, {"Retry-After": "soon"}, "<html>Too Many Requests</html>", "rate", None),
        # A moment that has passed is a stale one: no wait
        (429, {"Retry-After": "Wed, 31 Dec 2025 23:00:00 GMT"}, {}, "rate", 0),
        (429, {}, {"error": {"code": "model_cooldown", "reset_time": "2025-12-31T00:00:00Z"}}, "cooldown", 0),
        # Words
        (429, {}, {"error": {"message": "Rate limit reached. Please try again in 7m12.5s."}}, "rate", 432.5),
        (429, {}, {"error": {"message": "Try again in 2 minutes and 5 seconds"}}, "rate", 125),
        (429, {}, {"error": {"message": "Your quota will reset after 1h2m3s."}}, "quota", 3723),
        (503, {}, [{"error": {"code": 503, "message": "The model is overloaded. Please try again later."}}],
         "overloaded", None),
    ],
)  # fmt: skip
def test_kinds_and_waits(status: int, headers: dict[str, str], body: Any, kind: str, wait: float | None) -> None:
    for form in (body, json.dumps(body), json.dumps(body, ensure_ascii=False).encode()):
        notice = read_notice(status, headers, form, NOW)
        assert notice is not None
        assert notice.kind == kind
        assert notice.wait_seconds == (pytest.approx(wait) if wait is not None else None)


def test_reasons_for_people() -> None:
    def reason(body: Any) -> str:
        notice = read_notice(429, {}, body, NOW)
        assert notice is not None
        return notice.reason

    assert reason(COOLDOWN) == "MODEL_COOLDOWN"
    assert reason(GEMINI) == reason({"error": {"code": "insufficient_quota"}}) == "QUOTA_EXHAUSTED"
    assert reason({"error": {"code": "rate_limit_exceeded"}}) == "RATE_LIMITED"


def test_other_errors_are_no_limits() -> None:
    assert read_notice(400, {}, {"error": {"message": "response_format is not supported"}}) is None
    assert read_notice(500, {}, "Internal Server Error") is None
    assert read_notice(200, {}, {"choices": [{"message": {"content": "rate limit"}}]}) is None
    assert go_duration("soon") is None
    assert go_duration("1s later") is None
