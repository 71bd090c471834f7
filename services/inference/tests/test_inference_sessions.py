"""Sessions over gRPC and HTTP, answered by real engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc.aio
import httpx
import openai
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from served_toy import Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.testing.waiting import until

# vLLM imports torch in three processes one after the other: minutes on a busy machine.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])],
)
async def served(request: Any, toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("data")
    async with served_toy(request.param, toy.model, folder, session_max_bytes=20_000, session_max_per_key=60) as one:
        one.new_key("anna")
        one.new_key("ben")
        yield one


async def opened(served: Served, key: str = "", **fields: Any) -> str:
    answer = await served.call("CreateSession", pb.CreateSessionRequest(**fields), key or served.keys["anna"])
    return answer.session.name


async def history(served: Served, name: str, key: str = "") -> list[tuple[str, str]]:
    answer = await served.call("GetSession", pb.GetSessionRequest(name=name), key or served.keys["anna"])
    return [(message.role, message.content) for message in answer.session.messages]


def text_of(pieces: list[pb.ChatResponse]) -> str:
    return "".join(piece.delta for piece in pieces)


async def test_a_session_answers_as_the_whole_conversation_would(served: Served) -> None:
    anna = served.keys["anna"]
    name = await opened(served, system_prompt="You keep a lighthouse.", category="tales")
    first = text_of(await served.chat(ask("What is your name?", session=name, max_tokens=8), anna))
    second = await served.chat(ask("Where do the boats go?", session=name, max_tokens=8), anna)
    whole = pb.ChatRequest(
        messages=[
            pb.Message(role="system", content="You keep a lighthouse."),
            pb.Message(role="user", content="What is your name?"),
            pb.Message(role="assistant", content=first),
            pb.Message(role="user", content="Where do the boats go?"),
        ],
        sampling=pb.SamplingParameters(max_tokens=8, temperature=0.0),
    )
    plain = await served.chat(whole, anna)
    assert second[-1].usage.prompt_tokens == plain[-1].usage.prompt_tokens
    assert text_of(second) == text_of(plain)
    said = [("user", "What is your name?"), ("assistant", first), ("user", "Where do the boats go?")]
    assert await history(served, name) == [*said, ("assistant", text_of(second))]
    kept = (await served.call("GetSession", pb.GetSessionRequest(name=name), anna)).session
    assert (kept.category, kept.system_prompt) == ("tales", "You keep a lighthouse.")
    assert kept.expire_time.ToDatetime() - kept.create_time.ToDatetime() >= timedelta(hours=24)
    assert served.metric("loraline_inference_session_events_total", event="turn_kept") >= 2
    assert served.metric("loraline_inference_sessions") >= 1


async def test_reset_delete_and_list_in_pages(served: Served) -> None:
    ben = served.new_key("ben-lists")
    names = [await opened(served, ben, category=f"c{number}") for number in range(5)]
    await served.chat(ask(session=names[0], max_tokens=4), ben)
    reset = await served.call("ResetSession", pb.ResetSessionRequest(name=names[0]), ben)
    assert (reset.session.category, len(reset.session.messages)) == ("c0", 0)
    seen, token = [], ""
    for _ in range(9):
        page = await served.call("ListSessions", pb.ListSessionsRequest(page_size=2, page_token=token), ben)
        seen += [session.name for session in page.sessions]
        token = page.next_page_token
        if not token:
            break
    assert seen == names[::-1]
    await served.call("DeleteSession", pb.DeleteSessionRequest(name=names[1]), ben)
    for method in ("GetSession", "ResetSession", "DeleteSession"):
        error = await refused(served.call(method, getattr(pb, f"{method}Request")(name=names[1]), ben))
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    error = await refused(served.call("ListSessions", pb.ListSessionsRequest(page_token="x"), ben))
    assert error.fields.keys() == {"page_token"}


async def test_another_keys_session_is_not_found_even_for_operators(served: Served) -> None:
    name = await opened(served)
    for key in (served.keys["ben"], served.key):
        for method in ("GetSession", "ResetSession", "DeleteSession"):
            error = await refused(served.call(method, getattr(pb, f"{method}Request")(name=name), key))
            assert error.reason == "SESSION_NOT_FOUND"
        assert (await refused(served.chat(ask(session=name), key))).reason == "SESSION_NOT_FOUND"
        listed = await served.call("ListSessions", pb.ListSessionsRequest(page_size=500), key)
        assert name not in [session.name for session in listed.sessions]
    assert await history(served, name) == []


def long_ask(name: str) -> pb.ChatRequest:
    request = ask(session=name, max_tokens=400, temperature=1.0)
    request.structured.regex = "[a-z]{390}"
    return request


async def test_a_second_turn_at_once_is_refused_and_a_cancelled_one_leaves_no_trace(served: Served) -> None:
    anna, name = served.keys["anna"], await opened(served)
    await served.chat(ask("Hello", session=name, max_tokens=4), anna)
    before = await history(served, name)
    running = served.stub.Chat(long_ask(name), metadata=served.metadata(anna))
    await running.read()
    error = await refused(served.chat(ask(session=name, max_tokens=2), anna))
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "SESSION_BUSY")
    assert error.retry_after is not None
    running.cancel()
    await until(lambda: served.metric("loraline_inference_in_flight_requests") == 0, "the slot")
    assert await history(served, name) == before
    assert text_of(await served.chat(ask("And now?", session=name, max_tokens=4), anna))
    assert len(await history(served, name)) == len(before) + 2


async def test_a_turn_that_fails_leaves_the_history_as_it_was(served: Served) -> None:
    anna, name = served.keys["anna"], await opened(served)
    cut = long_ask(name)
    cut.sampling.max_tokens = 5
    assert (await refused(served.chat(cut, anna))).reason == "STRUCTURED_ANSWER_CUT"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.stub.Chat(long_ask(name), metadata=served.metadata(anna), timeout=0.2):
            pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    unserved = ask(session=name, model="nobody")
    assert (await refused(served.chat(unserved, anna))).reason == "MODEL_NOT_SERVED"
    await until(lambda: served.metric("loraline_inference_in_flight_requests") == 0, "the slot")
    assert await history(served, name) == []


async def test_a_reset_during_a_turn_wins(served: Served) -> None:
    anna, name = served.keys["anna"], await opened(served)
    request = ask(session=name, max_tokens=300, temperature=1.0)
    request.structured.regex = "[a-z]{290}"
    running = served.stub.Chat(request, metadata=served.metadata(anna))
    await running.read()
    await served.call("ResetSession", pb.ResetSessionRequest(name=name), anna)

    async def rest() -> None:
        while await running.read() is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
            pass

    error = await refused(rest())
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "SESSION_CHANGED")
    assert await history(served, name) == []


async def test_long_conversations_are_trimmed_by_whole_turns_and_that_is_said(served: Served) -> None:
    anna, name = served.keys["anna"], await opened(served, system_prompt="You keep a lighthouse.")
    turn, said = "The boats and the nets of the harbour. " * 6, []
    for number in range(8):
        pieces = await served.chat(ask(f"{number}: {turn}", session=name, max_tokens=16), anna)
        assert pieces[-1].usage.prompt_tokens + 16 <= 512
        said.append(" ".join(pieces[-1].notices))
    assert "left out" not in said[0]
    assert "left out" in said[-1]
    assert name in said[-1]
    assert len(await history(served, name)) == 16  # the session keeps them


async def test_bounds_are_typed(served: Served) -> None:
    anna = served.new_key("anna-bounds")
    for seconds in (0, -1, 10**9):
        request = pb.CreateSessionRequest(ttl=Duration(seconds=seconds))
        error = await refused(served.call("CreateSession", request, anna))
        assert (error.reason, list(error.fields)) == ("SESSION_TTL_INVALID", ["ttl"])
    name = await opened(served, anna)
    error = await refused(served.chat(ask("x" * 20_001, session=name), anna))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_FULL")
    only_system = ask(session=name)
    only_system.messages[0].role = "system"
    assert (await refused(served.chat(only_system, anna))).reason == "SESSION_TURN_EMPTY"
    assert (await refused(served.chat(ask("a\x00b", session=name), anna))).reason == "SESSION_TEXT_INVALID"
    for _ in range(59):
        await opened(served, anna)
    assert (await refused(opened(served, anna))).reason == "TOO_MANY_SESSIONS"


async def test_sessions_over_http(served: Served) -> None:
    headers = {"authorization": f"Bearer {served.keys['anna']}"}
    async with httpx.AsyncClient(base_url=served.http, headers=headers, timeout=60) as client:
        made = await client.post("/v1/sessions", json={"system_prompt": "Be brief.", "model": "toy", "ttl": "3600s"})
        assert made.status_code == 201
        name = made.json()["name"]
        body = {"session": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert answer["model"] == "toy"
        got = (await client.get(f"/v1/sessions/{name}")).json()
        assert [message["role"] for message in got["messages"]] == ["user", "assistant"]
        assert got["messages"][1]["content"] == answer["choices"][0]["message"]["content"]
        assert name in [item["name"] for item in (await client.get("/v1/sessions?page_size=500")).json()["data"]]
        other = {"authorization": f"Bearer {served.keys['ben']}"}
        hidden = await client.get(f"/v1/sessions/{name}", headers=other)
        assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "session_not_found")
        assert (await client.post(f"/v1/sessions/{name}/reset")).json()["messages"] == []
        for bad in ({"ttl": "soon"}, {"nope": 1}, {"system_prompt": "x" * 20_001}):
            assert (await client.post("/v1/sessions", json=bad)).status_code == 400
        assert (await client.delete(f"/v1/sessions/{name}")).json()["deleted"] is True
        assert (await client.get(f"/v1/sessions/{name}")).status_code == 404


async def test_the_openai_client_streams_a_sessions_turn(served: Served) -> None:
    name = await opened(served)
    client = openai.AsyncOpenAI(base_url=f"{served.http}/v1", api_key=served.keys["anna"], max_retries=0)
    stream: Any = await client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=6,
        stream=True,
        extra_body={"session": name},
    )
    told = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert await history(served, name) == [("user", "Hello"), ("assistant", "".join(told))]
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "Hi"}], extra_body={"session": "nobody"}
        )


async def test_two_turns_at_once_keep_one_history(served: Served) -> None:
    anna, name = served.keys["anna"], await opened(served)
    tries = await asyncio.gather(
        *(served.chat(ask(f"turn {number}", session=name, max_tokens=12), anna) for number in range(6)),
        return_exceptions=True,
    )
    answered = [index for index, one in enumerate(tries) if isinstance(one, list)]
    said = await history(served, name)
    assert 1 <= len(answered) == len(said) // 2
    assert sorted(content for role, content in said if role == "user") == [f"turn {index}" for index in answered]
