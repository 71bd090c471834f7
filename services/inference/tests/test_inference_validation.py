"""Whole answers are checked whatever decoding promised: an engine that says what it was not allowed to is found out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from counting_engine import CountingChoice, CountingEngine
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from served_profiles import client, events_of
from served_toy import Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.inference.engines.port import EngineRequest, Piece
from loraline.inference.http import profiles as routes

pytestmark = [pytest.mark.asyncio(loop_scope="module")]
GOOD = {"title": "바다 산책", "description": "아침에 바다를 걷는다"}
ENGLISH = {"title": "sea walk", "description": "아침에 바다를 걷는다"}
ASKED = {"text": "바다가 좋아요"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    chosen = CountingChoice("transformers", "counts")
    data, often = tmp_path_factory.mktemp("data"), {"profile_heartbeat_seconds": 0.05}
    async with served_toy("transformers", toy.model, data, chosen, **often) as one:
        one.new_key("anna")
        yield one


def challenge(*challenges: Any) -> str:
    return json.dumps({"recommend": "물물", "challenges": list(challenges)}, ensure_ascii=False)


def says(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[EngineRequest]:
    """Make the engine say one text after the other, each as a whole answer; return what it was asked."""
    asked: list[EngineRequest] = []

    async def generate(self: CountingEngine, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        if request.constraint is not None:  # not the watch's, who asks whether the engine still generates
            asked.append(request)
        await self.gate.wait()
        text = texts[min(len(asked), len(texts)) - 1]
        for start in range(0, len(text), 7):
            yield Piece(0, text[start : start + 7], [1])
        yield Piece(0, "", [2], "stop")

    monkeypatch.setattr(CountingEngine, "generate", generate)
    return asked


async def post(served: Served, accept: str = "text/event-stream", **asked: Any) -> httpx.Response:
    async with client(served, accept=accept) as http:
        return await http.post("/profiles/challenge", json={**ASKED, **asked})


async def test_challenges_that_are_no_list_never_close_a_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_PLAIN_ERROR_SECONDS", 60)  # else a busy machine makes an event of it
    asked = says(monkeypatch, '{"recommend":"물물","challenges":"x"}')
    failed = served.metric(
        "loraline_inference_structured_failures_total", shape="json_schema", reason="STRUCTURED_ANSWER_INVALID"
    )
    told = await post(served, retries=0)
    assert (told.status_code, told.json()["error"]["code"]) == (500, "structured_answer_invalid")
    assert "challenges" in told.json()["error"]["message"]
    assert "event: close" not in told.text
    assert (await post(served, "application/json", retries=0)).json() == told.json()
    assert len(asked) == 2
    assert failed + 2 == served.metric(
        "loraline_inference_structured_failures_total", shape="json_schema", reason="STRUCTURED_ANSWER_INVALID"
    )


async def test_a_stray_item_ends_a_stream_after_the_good_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = says(monkeypatch, challenge(GOOD, ENGLISH), challenge(GOOD))
    told = await post(served, retries=2)
    assert told.status_code == 200
    found = events_of(told.text)
    assert [event for _, event, _ in found] == ["challenge", "error"]
    assert found[0][2] == GOOD
    assert found[1][2]["code"] == "language_mismatch"
    assert "'s'" in found[1][2]["message"]
    assert len(asked) == 1  # what was sent cannot be taken back: no other try


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_bad_answer_is_asked_for_again_and_counted(
    served: Served, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    def again() -> float:
        return served.metric("loraline_inference_structured_retries_total", reason="LANGUAGE_MISMATCH")

    asked = says(monkeypatch, challenge(ENGLISH), challenge(GOOD))
    before = again()
    told = await post(served, accept, retries=1)
    assert told.status_code == 200, told.text
    if accept == "application/json":
        assert told.json()["answer"] == json.loads(challenge(GOOD))
    else:
        assert [event for _, event, _ in events_of(told.text)] == ["challenge", "figures", "close"]
        assert events_of(told.text)[-1][2] == json.loads(challenge(GOOD))
    assert (len(asked), again() - before) == (2, 1)


async def test_items_that_must_differ_are_compared_after_decoding(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    request = pb.GenerateRequest(prompt="Two numbers")
    request.structured.json_schema.CopyFrom(ParseDict(schema, Struct()))
    says(monkeypatch, "[5,5]")
    error = await refused(served.call("Generate", request))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "STRUCTURED_ANSWER_INVALID")
    says(monkeypatch, "[5,6]")
    assert (await served.call("Generate", request)).completions[0].text == "[5,6]"


async def test_a_silent_stream_is_kept_open_by_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_PLAIN_ERROR_SECONDS", 0.05)
    says(monkeypatch, challenge(GOOD))
    gate = served.component.extra["host"].serving().engine.gate
    gate.clear()
    raw = b""
    try:
        async with (
            client(served, accept="text/event-stream") as http,
            http.stream("POST", "/profiles/challenge", json=ASKED) as answer,
        ):
            assert answer.status_code == 200
            async for part in answer.aiter_raw():
                raw += part
                if raw.count(b"\n\n: still here\n\n: still here\n\n"):
                    gate.set()
    finally:
        gate.set()
    assert raw.startswith(b"retry: 2000\n\n: still here\n\n: still here\n\n")
    assert [event for _, event, _ in events_of(raw.decode())] == ["challenge", "figures", "close"]
    assert raw.endswith(b"\n\n") and raw.rstrip().rpartition(b"\n")[2].startswith(b"data: ")


async def test_a_question_in_no_known_language_is_answered_without_a_rule_and_told_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def notices(text: str) -> list[str]:
        request = ask(text)
        request.language = "question"
        return list((await served.chat(request))[-1].notices)

    asked = says(monkeypatch, "It is so.")
    said = "The question's language was not found, so no language rule was applied to the answer."
    assert said in await notices("12 + 3")
    assert not asked  # with a shape, that is
    assert said not in await notices("Where do the boats go?")
    assert len(asked) == 1
