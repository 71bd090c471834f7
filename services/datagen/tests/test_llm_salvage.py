"""The salvage ladder: every complete item byte for byte, never an invented one. And what providers say of limits."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraline.datagen.llms.quota import go_duration, read_notice
from loraline.datagen.llms.salvage import salvage

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['{"', "```", "}]", '\\"', "[2]"]
)
ITEM = st.fixed_dictionaries({"q": TEXT, "a": TEXT | st.lists(st.fixed_dictionaries({"t": TEXT}), max_size=2)})
PROSE = st.sampled_from(["", "Sure! ", "요청하신 [2개]:\n", "Here { you go:\n", '<think>{"q": 1}</think>', "{2개} "])


@pytest.mark.parametrize(
    ("text", "found", "rung"),
    [
        ('[{"a": 1}, {"a": 2}]', [1, 2], "whole"),
        ('{"items": [{"a": 1}]}', [1], "whole"),
        ('{"a": 1}', [1], "whole"),
        ('```json\n[{"a": 1}]\n```', [1], "fenced"),
        ('Here:\n```\n{"items": [{"a": 1}]}\n```\nand\n```json\n{"a": 2}\n```', [1, 2], "fenced"),
        ('<think>[{"a": 9}]</think>[{"a": 1}]', [1], "whole"),
        ('{"items": [{"a": 1}, {"a": 2}, {"a": "cu', [1, 2], "objects"),
        ('```json\n[{"a": 1}, {"a": {"b": {"c": 1}, "d', [1], "objects"),
        ('1. {"a": 1}\n2. {"a": 2}', [1, 2], "objects"),
        ('One {oops} then {"a": 1}', [1], "objects"),
        ("요청하신 [2개] 입니다", [], "none"),
        ("[1, 2, 3]", [], "none"),
        ("", [], "none"),
        ("<think>never ends {\"a\": 1}", [], "none"),
    ],
)  # fmt: skip
def test_the_ladder(text: str, found: list[int], rung: str) -> None:
    got = salvage(text)
    assert [item["a"] for item in got.items] == found
    assert got.rung == rung or (not found and got.rung == "whole")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ITEM, min_size=1, max_size=5), PROSE, st.sampled_from(["array", "wrapped", "fenced", "loose"]), st.data()
)
def test_whole_and_cut_answers(made: list[dict[str, Any]], prose: str, form: str, data: st.DataObject) -> None:
    parts = [json.dumps(item, ensure_ascii=False) for item in made]
    body = {
        "array": f"[{', '.join(parts)}]",
        "wrapped": f'{{"items": [{", ".join(parts)}]}}',
        "fenced": f"```json\n[{', '.join(parts)}]\n```",
        "loose": "\n".join(parts),
    }[form]
    text = prose + body
    complete = salvage(text).items
    # A fence inside an item's own text may hide the outer one; it must then still not invent anything.
    assert all(item in made for item in complete)
    if "```" not in "".join(parts):
        assert complete == made
    cut = data.draw(st.integers(len(prose), len(text)))
    kept = salvage(text[:cut]).items
    assert all(item in made for item in kept)
    if "```" not in "".join(parts) and form != "fenced":
        whole = [item for item, part in zip(made, parts, strict=True) if _ends(text, parts, part) <= cut]
        assert len(kept) >= len(whole) - _repeated(parts)


def _ends(text: str, parts: list[str], part: str) -> int:
    at = text.index(parts[0])
    for other in parts:
        at = text.index(other, at) + len(other)
        if other is part:
            return at
    raise AssertionError


def _repeated(parts: list[str]) -> int:
    return len(parts) - len(set(parts))


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


def test_other_errors_are_no_limits() -> None:
    assert read_notice(400, {}, {"error": {"message": "response_format is not supported"}}) is None
    assert read_notice(500, {}, "Internal Server Error") is None
    assert go_duration("soon") is None
    assert go_duration("1s later") is None
