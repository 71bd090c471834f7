"""The lean transport, byte for byte: chunks, closes, resets, slowness, compression, and providers' errors over it."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from loraline.core.errors import LoralineError
from loraline.datagen.llms.asking import ask
from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.failures import BadRequest, Filtered, Overloaded, QuotaReached, TimedOut
from loraline.datagen.llms.transport import ClientTransport, LeanTransport, open_transport

from .raw_provider import Script, http, playing

GOOD = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": "안녕"}}], "model": "m"}).encode()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def endpoint_at(url: str, **fields: Any) -> Endpoint:
    return Endpoint("default", url, "m", "sk-test", **fields)


async def answer(url: str, seconds: float = 5.0, kind: Any = LeanTransport, times: int = 1) -> str:
    endpoint = endpoint_at(url)
    transport = kind(endpoint, seconds)
    content = ""
    try:
        for _ in range(times):
            content = (await ask(transport, endpoint, b'{"a": 1}')).content
    finally:
        await transport.close()
    return content


def chunks(body: bytes, size: int) -> list[bytes]:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]


@pytest.mark.parametrize(
    "script",
    [
        [http(200, GOOD)],
        [bytes([byte]) for byte in http(200, GOOD)],
        [CHUNKED, *chunks(GOOD, 7)],
        [b"HTTP/1.1 200 OK\r\n\r\n", GOOD[:20], 0.05, GOOD[20:], "close"],
        [b"HTTP/1.1 200 OK\r\n\r\n", GOOD, "half", 0.2, "close"],
        [b"HTTP/1.0 200 OK\r\n\r\n", GOOD, "close"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", http(200, GOOD)],
        [http(200, gzip.compress(GOOD), "Content-Encoding: gzip")],
        [http(200, GOOD, "Connection: close"), "close"],
    ],
)
async def test_whole_answers_in_every_wrapping(script: Script) -> None:
    async with playing(script) as provider:
        assert await answer(provider.url, times=2) == "안녕"
        assert len(provider.requests) == 2


@pytest.mark.parametrize(
    "script",
    [
        ["close"],
        ["reset"],
        [b"HTTP/1.1 200 OK\r\nContent-Le", "close"],
        [http(200, GOOD)[:-9], "close"],
        [http(200, GOOD)[:-9], "half", 0.1, "close"],
        [http(200, GOOD)[:-9], "reset"],
        [CHUNKED, *chunks(GOOD, 7)[:-1], "close"],
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [http(200, b"not gzip", "Content-Encoding: gzip")],
        [http(200, GOOD, "Content-Encoding: br")],
    ],
)
async def test_broken_answers_may_pass_and_are_never_taken(script: Script) -> None:
    async with playing(script) as provider:
        with pytest.raises(Overloaded):
            await answer(provider.url)


@pytest.mark.parametrize("kind", [LeanTransport, ClientTransport])
@pytest.mark.parametrize("script", [[2.0], [b"HTTP/1.1 200 OK\r\n", 2.0], [http(200, GOOD)[:-5], 2.0]])
async def test_slow_ones_time_out(script: Script, kind: Any) -> None:
    async with playing(script) as provider:
        with pytest.raises(TimedOut):
            await answer(provider.url, 0.2, kind)


async def test_a_connection_that_was_closed_while_idle_is_replaced_without_a_failure() -> None:
    async with playing([http(200, GOOD), "close"], [http(200, GOOD)]) as provider:
        endpoint = endpoint_at(provider.url)
        transport = LeanTransport(endpoint, 5)
        assert (await ask(transport, endpoint, b"{}")).content == "안녕"
        await asyncio.sleep(0.05)
        assert (await ask(transport, endpoint, b"{}")).content == "안녕"
        assert provider.connections == 2
        for _ in range(3):
            await ask(transport, endpoint, b"{}")
        assert provider.connections == 2
        await transport.close()


async def test_what_is_sent() -> None:
    async with playing([http(200, GOOD)]) as provider:
        await answer(provider.url + "?api-version=1")
        head, _, body = provider.requests[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/chat/completions?api-version=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"Authorization: Bearer sk-test" in head
        assert body == b'{"a": 1}'


def error(status: int, body: object, *headers: str) -> Script:
    return [http(status, json.dumps(body).encode(), *headers)]


@pytest.mark.parametrize("kind", [LeanTransport, ClientTransport])
@pytest.mark.parametrize(
    ("script", "raised"),
    [
        (error(429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "x"}}]), QuotaReached),
        (error(200, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "x"}}]), QuotaReached),
        (error(200, {"choices": None, "error": {"code": 429, "message": "x"}}), QuotaReached),
        (error(200, {"choices": [], "error": {"message": "upstream died"}}), Overloaded),
        (error(200, {"error": {"message": "upstream died"}}), Overloaded),
        (error(200, {"object": "list"}), LoralineError),
        (error(200, "text"), LoralineError),
        ([http(200, b"<html>hello</html>")], LoralineError),
        ([http(502, b"<html>Bad Gateway</html>")], Overloaded),
        ([http(504, b"")], TimedOut),
        (error(529, {"error": {"type": "overloaded_error"}}), QuotaReached),
        (error(503, {"error": {"code": "server_is_overloaded"}}, "Retry-After: 3"), QuotaReached),
        (error(400, {"error": {"message": "response_format"}}), BadRequest),
        (error(422, {"detail": "no"}), BadRequest),
        (error(400, {"error": {"code": "content_filter", "message": "filtered"}}), Filtered),
        (
            error(403, {"error": {"code": 403, "message": "It requires moderation; your input was flagged"}}),
            Filtered,
        ),
        (error(400, {"error": {"code": 400, "message": "cannot parse 'the quota exceeded its limit'"}}), BadRequest),
        (error(400, {"error": {"code": "quota_exceeded", "message": "no more"}}), QuotaReached),
        (error(400, {"error": {"message": "Your credit balance is too low"}}), QuotaReached),
        (error(401, {"error": {"message": "rate limit of bad keys"}}), LoralineError),
        (error(404, {"error": {"message": "no such model"}}), LoralineError),
    ],
)
async def test_errors_over_both_transports(script: Script, raised: type[Exception], kind: Any) -> None:
    async with playing(script) as provider:
        with pytest.raises(raised):
            await answer(provider.url, kind=kind)


async def test_a_proxy_of_the_environment_is_used_and_one_that_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with playing([http(200, GOOD)], [http(407, b"")]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        url = "http://model.invalid/v1"
        assert isinstance(open_transport(endpoint_at(url), 1), ClientTransport)
        assert await answer(url, kind=open_transport) == "안녕"
        assert b"http://model.invalid/v1/chat/completions" in proxy.requests[0]
        with pytest.raises(LoralineError) as caught:
            await answer(url, kind=open_transport)
        assert caught.value.reason == "ENDPOINT_PROXY"
        monkeypatch.setenv("NO_PROXY", "model.invalid")
        assert isinstance(open_transport(endpoint_at(url), 1), LeanTransport)


async def test_usage_and_cost() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    body = {**json.loads(GOOD), "usage": usage}
    async with playing(error(200, body), error(200, {**body, "usage": {**usage, "cost": 0.5}})) as provider:
        endpoint = endpoint_at(provider.url, prices=(1.0, 4.0))
        transport = LeanTransport(endpoint, 5)
        assert (await ask(transport, endpoint, b"{}")).cost == pytest.approx(0.003)
        assert (await ask(transport, endpoint, b"{}")).cost == 0.5
        await transport.close()
