"""What OpenAI's own client and curl get of log-probabilities, tools, raw events, errors and a cancelled request."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from served_tools import BOAT, CALL, WEATHER, with_tools
from served_toy import Served, served_toy

from loraline.core.errors import LoralineError
from loraline.core.testing.waiting import until
from loraline.inference.engines.tool_calls import check_parser

# vLLM imports torch in three processes one after the other: minutes on a busy machine.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
HELLO: Any = [{"role": "user", "content": "Tell me about the storm"}]


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])],
)
async def served(request: Any, toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    # The parsers of calls are vLLM's, also where another engine generates.
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("openai")
    settings = {"max_model_len": 2048, "tool_parser": "hermes"}
    async with served_toy(request.param, with_tools(toy.model, root / "tools"), root / "data", **settings) as one:
        yield one


@pytest.fixture
def client(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.http}/v1", api_key=served.key, max_retries=0)


async def chat(client: openai.AsyncOpenAI, **asked: Any) -> Any:
    return await client.chat.completions.create(
        **{"model": "toy", "messages": HELLO, "max_tokens": 12, "temperature": 0, **asked}
    )


async def test_log_probabilities_of_chats(client: openai.AsyncOpenAI) -> None:
    asked = {"logprobs": True, "top_logprobs": 3}
    choice = (await chat(client, **asked)).choices[0]
    told = choice.logprobs.content
    assert 1 <= len(told) <= 12
    for token in told:
        # Greedy: the one taken is the likeliest.
        assert [token.token, token.logprob] == [token.top_logprobs[0].token, token.top_logprobs[0].logprob]
        figures = [other.logprob for other in token.top_logprobs]
        assert figures == sorted(figures, reverse=True)
        assert len(figures) == 3
        assert sum(map(math.exp, figures)) <= 1 + 1e-6
        assert bytes(token.bytes).decode() == token.token
    streamed = [chunk async for chunk in await chat(client, **asked, stream=True)]
    again = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in again] == [token.token for token in told]
    assert [token.logprob for token in again] == pytest.approx([token.logprob for token in told], abs=1e-4)
    alone = (await chat(client, logprobs=True)).choices[0].logprobs.content
    assert [(token.token, token.top_logprobs) for token in alone] == [(token.token, []) for token in told]
    assert (await chat(client)).choices[0].logprobs is None


async def test_log_probabilities_of_completions(client: openai.AsyncOpenAI) -> None:
    asked: Any = {
        "model": "toy",
        "prompt": "Where do the boats go? Out past the",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 2,
    }
    told = (await client.completions.create(**asked)).choices[0].logprobs
    assert told is not None
    assert told.tokens
    assert told.token_logprobs
    assert told.top_logprobs
    for token, figure, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert figure == max(top.values())
        assert token in top
    offsets: list[int] = []
    async for piece in await client.completions.create(**asked, stream=True):
        offsets += (piece.choices[0].logprobs and piece.choices[0].logprobs.text_offset) or []
    assert offsets == told.text_offset
    assert offsets == [sum(map(len, told.tokens[:count])) for count in range(len(told.tokens))]


async def test_several_answers_seed_and_stop(client: openai.AsyncOpenAI) -> None:
    asked = {"n": 3, "temperature": 1.3, "seed": 11}
    first = [choice.message.content for choice in (await chat(client, **asked)).choices]
    assert len(set(first)) > 1
    assert [choice.message.content for choice in (await chat(client, **asked)).choices] == first
    texts = {0: "", 1: "", 2: ""}
    finished: dict[int, str] = {}
    async for chunk in await chat(client, **asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert list(texts.values()) == first
    assert sorted(finished) == [0, 1, 2]
    whole = (await chat(client, max_tokens=40)).choices[0].message.content
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter.isalnum())
    cut = (await chat(client, max_tokens=40, stop=[stop])).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


async def test_an_answer_that_would_end_goes_on_where_its_end_is_ignored(client: openai.AsyncOpenAI) -> None:
    sampled = {"max_tokens": 300, "temperature": 2.0}
    ended = None
    for seed in range(60):
        plain = await chat(client, **sampled, seed=seed)
        if plain.choices[0].finish_reason == "stop":
            ended = seed, plain.usage.completion_tokens
            break
    assert ended is not None, "no seed gave an answer that ends; the model never says its end"
    seed, tokens = ended
    unended = await chat(client, **sampled, seed=seed, extra_body={"ignore_eos": True})
    assert (unended.choices[0].finish_reason, unended.usage.completion_tokens) == ("length", 300)
    assert tokens < 300


def arguments_are_right(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "find-boat":
        return value["size"] in {"small", "large"}
    return name == "weather" and set(value) == {"city", "days"} and value["days"] in {1, 2, 3}


def streamed_calls(chunks: list[Any]) -> list[tuple[str, str]]:
    """Return the calls that a stream's pieces add up to."""
    found: dict[int, list[str]] = {}
    for chunk in chunks:
        for call in (chunk.choices[0].delta.tool_calls if chunk.choices else None) or ():
            parts = found.setdefault(call.index, ["", ""])
            assert call.id or parts[0]
            parts[0] += call.function.name or ""
            parts[1] += call.function.arguments or ""
    return [(found[index][0], found[index][1]) for index in sorted(found)]


async def test_a_call_that_is_required_or_named(served: Served) -> None:
    def work() -> None:
        with openai.OpenAI(base_url=f"{served.http}/v1", api_key=served.key, max_retries=0) as client:
            asked: Any = {"model": "toy", "messages": HELLO, "tools": [WEATHER, BOAT], "max_tokens": 200, "seed": 3}
            one = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
            assert (one.finish_reason, one.message.content) == ("tool_calls", None)
            [call] = one.message.tool_calls or []
            function: Any = call.function  # type: ignore[union-attr]
            assert arguments_are_right(function.name, function.arguments)
            named: Any = {"type": "function", "function": {"name": "find-boat"}}
            whole: Any = client.chat.completions.create(**asked, tool_choice=named).choices[0]
            assert (whole.finish_reason, whole.message.tool_calls[0].function.name) == ("stop", "find-boat")
            assert arguments_are_right("find-boat", whole.message.tool_calls[0].function.arguments)
            stream = client.chat.completions.create(**asked, tool_choice=named, stream=True)
            assert streamed_calls(list(stream)) == [("find-boat", whole.message.tool_calls[0].function.arguments)]
            with pytest.raises(openai.BadRequestError) as cut:
                client.chat.completions.create(**{**asked, "max_tokens": 3}, tool_choice="required")
            assert cut.value.code == "structured_answer_cut"

    await asyncio.to_thread(work)


async def test_a_call_that_the_model_chooses(client: openai.AsyncOpenAI) -> None:
    asked = {"tools": [WEATHER, BOAT], "max_tokens": 120, "extra_body": {"structured_outputs": {"regex": CALL}}}
    choice = (await chat(client, **asked)).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert (choice.message.content, call.function.name) == (None, "weather")
    assert arguments_are_right("weather", call.function.arguments)
    chunks = [chunk async for chunk in await chat(client, **asked, stream=True)]
    [(name, arguments)] = streamed_calls(chunks)
    assert (name, json.loads(arguments)) == ("weather", json.loads(call.function.arguments))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    # What only looks like the beginning of a call is text.
    text = {"tools": [WEATHER], "extra_body": {"structured_outputs": {"choice": ["Look: <tool"]}}, "max_tokens": 30}
    assert (await chat(client, **text)).choices[0].message.content == "Look: <tool"
    pieces = [chunk.choices[0] async for chunk in await chat(client, **text, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == "Look: <tool"
    assert pieces[-1].finish_reason == "stop"


async def test_what_tools_returned_is_shown_to_the_model(client: openai.AsyncOpenAI) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "storm"},
    ]
    with_tools = {"tools": [WEATHER]}
    asked = ({}, {**with_tools, "tool_choice": "none"}, with_tools, {**with_tools, "messages": talk})
    sizes = [(await chat(client, **one)).usage.prompt_tokens for one in asked]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]


async def test_wrong_uses_name_the_parameter(client: openai.AsyncOpenAI) -> None:
    half = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    evil = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    for asked, param in [
        ({"tools": {"x": 1}}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [strict]}, "tools"),
        ({"tools": [evil]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": schema}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [half]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 5, "temperature": 1}, "n"),
        ({"extra_body": {"speed": 3}}, "speed"),
        ({"extra_body": {"ignore_eos": 1}}, "ignore_eos"),
        ({"extra_body": {"ignore_eos": True}, "response_format": schema}, "ignore_eos"),
        ({"extra_body": {"ignore_eos": True, "language": "ko"}}, "ignore_eos"),
        ({"extra_body": {"ignore_eos": True, "forbid": ["emoji"]}}, "ignore_eos"),
        ({"extra_body": {"ignore_eos": True}, "tools": [WEATHER], "tool_choice": "required"}, "ignore_eos"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ]:
        with pytest.raises(openai.BadRequestError) as bad:
            await chat(client, **asked)
        assert bad.value.param == param, asked
    neutral = {"store": False, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto", "logit_bias": {}}
    assert (await chat(client, **neutral)).choices


async def test_a_parser_that_vllm_does_not_have_is_refused_with_those_it_has(served: Served) -> None:
    with pytest.raises(LoralineError) as caught:
        await asyncio.to_thread(check_parser, "hermit")
    assert caught.value.reason == "TOOL_PARSER_UNKNOWN"
    assert "'hermit'" in caught.value.message and " hermes," in caught.value.message
    await asyncio.to_thread(check_parser, "hermes")


async def test_there_are_no_embeddings_and_it_says_why(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as none:
        await client.embeddings.create(model="toy", input="Hello")
    assert none.value.code == "embeddings_not_served"
    assert "toy" in none.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.images.generate(prompt="a boat")
    assert unknown.value.code == "unknown_url"
    assert "/v1/chat/completions" in unknown.value.message


async def curl(served: Served, path: str, body: Any) -> tuple[str, bytes]:
    """Return head and raw bytes of an answer."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sS", "-N", "-i", "--max-time", "200", f"{served.http}{path}"),
        *("-H", f"authorization: Bearer {served.key}", "-H", "content-type: application/json"),
        *("-d", json.dumps(body)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    head, _, rest = output.partition(b"\r\n\r\n")
    return head.decode().lower(), rest


def first_choices(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0] for chunk in chunks if chunk["choices"]]


async def test_raw_events_by_curl(served: Served) -> None:
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "Where do the boats go? Out past the"}),
    ]
    for path, body in bodies:
        asked = {"model": "toy", "max_tokens": 7, "temperature": 0, "stream": True, **body}
        head, raw = await curl(served, path, {**asked, "stream_options": {"include_usage": True}})
        assert head.startswith("http/1.1 200")
        assert "content-type: text/event-stream" in head
        assert raw.endswith(b"\n\ndata: [DONE]\n\n")
        events = raw.decode().removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        chunks = [json.loads(event[6:]) for event in events[:-1]]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["choices"] == []
        _, answer = await curl(served, path, {**asked, "stream": False})
        whole = json.loads(answer)
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        said = [one["delta"].get("content") if "delta" in one else one["text"] for one in first_choices(chunks)]
        last = whole["choices"][0]
        assert "".join(filter(None, said)) == (last["message"]["content"] if "message" in last else last["text"])
        _, plain = await curl(served, path, asked)
        assert b"usage" not in plain
        head, refused = await curl(served, path, {**asked, "temperature": 9})
        assert head.startswith("http/1.1 400")
        assert json.loads(refused)["error"]["param"] == "temperature"


async def test_a_cancelled_request_frees_its_slot(served: Served, client: openai.AsyncOpenAI) -> None:
    def inside() -> float:
        return served.metric("loraline_inference_in_flight_requests")

    long = {"max_tokens": 400, "temperature": 1.0, "extra_body": {"structured_outputs": {"regex": "[a-z]{390}"}}}
    stream = await chat(client, **long, stream=True)
    async for _ in stream:
        break
    assert inside() == 1
    await stream.close()
    await until(lambda: inside() == 0, "the stream's end")
    asking = asyncio.create_task(chat(client, **long))
    await until(lambda: inside() == 1, "a request")
    asking.cancel()
    await until(lambda: inside() == 0, "the request's end")
    with pytest.raises(openai.APITimeoutError):
        await chat(client, **long, timeout=httpx.Timeout(30, read=0.1))
    await until(lambda: inside() == 0, "the end of one that timed out")
