"""Who comes in: keys on every HTTP route, roles, limits of keys, /generate, and the bounded queue, on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
import pytest_asyncio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from served_toy import Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import KeyRing
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
    limits: dict[str, Any] = {"max_concurrent_requests": 1, "max_queued_requests": 3}
    async with served_toy(request.param, toy.model, tmp_path_factory.mktemp("data"), **limits) as one:
        one.new_key("anna")
        yield one


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def post(served: Served, path: str, body: Any, key: str = "") -> httpx.Response:
    async with httpx.AsyncClient(base_url=served.http, headers=bearer(key) if key else {}, timeout=60) as client:
        return await client.post(path, json=body)


async def test_every_http_route_asks_for_a_key(served: Served) -> None:
    routes = [(method, route.path) for route in served.component.http_app.routes for method in route.methods]  # type: ignore[union-attr]
    assert len(routes) >= 10
    async with httpx.AsyncClient(base_url=served.http, timeout=60) as client:
        for method, path in routes:
            url = path.replace("{name:path}", "x").replace("{name}", "x")
            for headers, code in (({}, "missing_key"), (bearer("lora_00000000_x"), "unknown_key")):
                answer = await client.request(method, url, headers=headers)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == code
            let_in = await client.request(method, url, headers=bearer(served.keys["anna"]))
            assert let_in.status_code not in {401, 403}, (method, path)
        for path in ("/", "/metrics", "/tokenize", "/v1/load_lora_adapter", "/v1/audio/speech", "/health/x"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=bearer(served.keys["anna"]))).status_code == 404


async def refusal(served: Served, method: MethodDescriptor, key: str) -> LoralineError | None:
    """Return the typed error of an empty request to a method; None where it is answered."""
    call, request = getattr(served.stub, method.name), GetMessageClass(method.input_type)()
    metadata = [("authorization", f"Bearer {key}")] if key else []

    async def asked() -> None:
        answer = call(request, metadata=metadata, timeout=60)
        if method.server_streaming:
            async for _ in answer:
                pass
        else:
            await answer

    try:
        await asked()
    except grpc.aio.AioRpcError:
        return await refused(asked())
    return None


async def test_every_grpc_method_asks_for_a_key_of_its_role(served: Served) -> None:
    methods = pb.DESCRIPTOR.services_by_name["InferenceService"].methods
    assert len(methods) >= 15
    operators = {"LoadModel", "LoadAdapter", "UnloadAdapter", "SetAlias", "Rollback"}
    assert operators < {method.name for method in methods}
    for method in methods:
        for key, reason in (("", "MISSING_KEY"), ("lora_00000000_x", "UNKNOWN_KEY")):
            error = await refusal(served, method, key)
            assert error is not None, method.name
            assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason), method.name
        error = await refusal(served, method, served.keys["anna"])
        code = error.code if error is not None else grpc.StatusCode.OK
        assert (code is grpc.StatusCode.PERMISSION_DENIED) == (method.name in operators), method.name
        assert code is not grpc.StatusCode.UNAUTHENTICATED, method.name
        error = await refusal(served, method, served.key)
        kept_out = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
        assert error is None or error.code not in kept_out, method.name
    assert await served.chat(ask(max_tokens=1), served.keys["anna"])


async def test_generate_takes_its_key_from_the_body_as_from_a_header(served: Served) -> None:
    anna = served.keys["anna"]
    # The line of the seed's documentation.
    answer = await post(served, "/generate", {"prompt": "hello", "api_key": anna})
    assert answer.status_code == 200
    told = answer.json()
    assert (told["model"], told["finish_reason"]) in {("toy", "length"), ("toy", "stop")}
    assert told["usage"]["completion_tokens"] <= 256
    short = {"prompt": "hello", "max_tokens": 5, "temperature": 0}
    in_body = (await post(served, "/generate", {**short, "api_key": anna})).json()
    in_header = (await post(served, "/generate", short, anna)).json()
    assert in_body["text"] == in_header["text"]
    assert in_body["usage"]["completion_tokens"] == 5
    assert "max_tokens=10" in " ".join(in_body["notices"])
    chat = await served.chat(ask("hello", max_tokens=5), anna)
    assert in_body["text"] == "".join(piece.delta for piece in chat)
    raw = (await post(served, "/generate", {**short, "raw": True}, anna)).json()
    assert raw["usage"]["prompt_tokens"] < in_body["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": "hello"}, 401, "missing_key"),
        ({"prompt": "hello", "api_key": ""}, 401, "missing_key"),
        ({"prompt": "hello", "api_key": 7}, 401, "missing_key"),
        ({"prompt": "hello", "api_key": "your-key"}, 401, "unknown_key"),
        ([], 401, "missing_key"),
        ({"prompt": "", "api_key": "anna"}, 400, "invalid_parameter"),
        ({"prompt": "hi", "api_key": "anna", "max_tokens": 0}, 400, "invalid_parameter"),
        ({"prompt": "hi", "api_key": "anna", "max_tokens": 10_000}, 400, "max_tokens_too_high"),
        ({"prompt": "hi " * 2000, "api_key": "anna"}, 400, "context_length_exceeded"),
        ({"prompt": "hi", "api_key": "anna", "stream": True}, 400, "unsupported_parameter"),
        ({"prompt": "hi", "api_key": "anna", "model": "nobody"}, 404, "model_not_found"),
    ],
)
async def test_generate_refuses(served: Served, body: Any, status: int, code: str) -> None:
    if isinstance(body, dict) and body.get("api_key") == "anna":
        body = {**body, "api_key": served.keys["anna"]}
    answer = await post(served, "/generate", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_revoked_key_is_refused_in_the_body_too(served: Served) -> None:
    key = served.new_key("soon-gone")
    body = {"prompt": "hi", "api_key": key, "max_tokens": 1}
    assert (await post(served, "/generate", body)).status_code == 200
    path = served.platform.settings.keys_file
    assert path is not None
    KeyRing(path).revoke("soon-gone")
    async with asyncio.timeout(5):
        while (await post(served, "/generate", body)).status_code != 401:
            await asyncio.sleep(0.1)
    assert (await refused(served.chat(ask(max_tokens=1), key))).reason == "UNKNOWN_KEY"


async def test_a_key_at_its_limit_of_requests_is_told_when_to_come_back(served: Served) -> None:
    key = served.new_key("thrifty", requests_per_minute=2)
    before = served.metric("loraline_inference_refused_total", reason="KEY_RATE_LIMITED")
    for _ in range(2):
        assert await served.chat(ask(max_tokens=1), key)
    error = await refused(served.chat(ask(max_tokens=1), key))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_RATE_LIMITED")
    assert error.retry_after is not None
    assert 1 <= error.retry_after.total_seconds() <= 30
    answer = await post(served, "/generate", {"prompt": "hi", "api_key": key})
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    with pytest.raises(openai.RateLimitError):
        client = openai.AsyncOpenAI(base_url=f"{served.http}/v1", api_key=key, max_retries=0)
        await client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "Hi"}])
    assert (await served.call("ListModels", pb.ListModelsRequest(), key)).models  # no question
    assert await served.chat(ask(max_tokens=1), served.keys["anna"])  # another key's own
    assert served.metric("loraline_inference_refused_total", reason="KEY_RATE_LIMITED") == before + 3


async def test_a_key_at_its_limit_of_tokens_waits(served: Served) -> None:
    key = served.new_key("talker", tokens_per_minute=20)
    assert await served.chat(ask(max_tokens=24), key)
    error = await refused(served.call("Generate", pb.GenerateRequest(prompt="hi"), key))
    assert error.metadata["limit"] == "20 tokens per minute"
    # A limit that is raised in the file counts within a second or two.
    path = served.platform.settings.keys_file
    assert path is not None
    text = path.read_text()
    path.write_text(text.replace('"tokens_per_minute": 20', '"tokens_per_minute": 100000'))
    async with asyncio.timeout(10):
        while True:
            try:
                request = pb.GenerateRequest(prompt="hi", sampling=pb.SamplingParameters(max_tokens=1))
                await served.call("Generate", request, key)
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)


async def test_a_full_queue_refuses_and_those_inside_are_answered(served: Served) -> None:
    request = ask(max_tokens=300, temperature=1.0)
    request.structured.regex = "[a-z]{290}"
    inside = [asyncio.create_task(served.chat(request)) for _ in range(4)]
    await until(lambda: served.metric("loraline_inference_queued_requests") == 3, "a full queue")
    before = served.metric("loraline_inference_refused_total", reason="QUEUE_FULL")
    error = await refused(served.chat(ask(max_tokens=1)))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert error.retry_after is not None
    answer = await post(
        served, "/v1/chat/completions", {"model": "toy", "messages": [{"role": "user", "content": "Hi"}]}, served.key
    )
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    inside[-1].cancel()  # whoever goes away leaves a place
    await until(lambda: served.metric("loraline_inference_queued_requests") == 2, "a place")
    late = asyncio.create_task(served.chat(ask(max_tokens=1)))
    assert all(pieces[-1].finish_reason for pieces in await asyncio.gather(*inside[:-1], late))
    assert served.metric("loraline_inference_refused_total", reason="QUEUE_FULL") == before + 2
    await until(lambda: served.metric("loraline_inference_queued_requests") == 0, "an empty queue")
