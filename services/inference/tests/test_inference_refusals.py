"""Refusals by their reasons, and limits and settings that make them, through a real server on an engine that counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from counting_engine import CountingChoice, CountingEngine
from google.protobuf.duration_pb2 import Duration
from served_tools import without_template
from served_toy import ADAPTER, MODEL, Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.refs import parse_ref
from loraline.inference.engines import chat_format
from loraline.inference.engines.port import EngineRefused

pytestmark = [pytest.mark.asyncio(loop_scope="module")]
BAD, UNMET = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
TOY, MAREVA = parse_ref("model/toy:v1"), parse_ref("adapter/mareva:v1")
LONG = "The boats and the nets. " * 20
TALK, LONG_TALK = ([{"role": "user", "content": text}] for text in ("Hi", LONG))
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    settings = {
        "max_prompt_tokens": 50,
        "session_ttl_seconds": 100,
        "session_max_ttl_seconds": 200,
        "session_max_turns": 2,
    }
    chosen = CountingChoice("transformers", "counts")
    data = tmp_path_factory.mktemp("data")
    async with served_toy("transformers", toy.model, data, chosen, **settings) as one:
        one.platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"])
        yield one


def completion(text: str = "Hello", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=text, sampling=pb.SamplingParameters(**sampling))


@pytest.mark.parametrize(
    ("method", "asked", "code", "reason", "field"),
    [
        ("Rollback", pb.RollbackRequest(name="mareva", alias="staging"), UNMET, "NOTHING_TO_ROLL_BACK", ""),
        ("LoadAdapter", pb.LoadAdapterRequest(adapter=TOY), BAD, "NOT_AN_ADAPTER", "adapter.kind"),
        ("SetAlias", pb.SetAliasRequest(adapter=TOY, alias="production"), BAD, "NOT_AN_ADAPTER", "adapter.kind"),
        ("LoadModel", pb.LoadModelRequest(model=BaseModel(artifact=MAREVA)), BAD, "NOT_A_MODEL", "model.artifact.kind"),
        ("Generate", completion(n=2, temperature=0), BAD, "GREEDY_WITH_N", "sampling.n"),
        ("Generate", completion(LONG), BAD, "PROMPT_TOO_LONG", "prompt"),
        ("Generate", completion(stop=["END", ""]), BAD, "REQUEST_REFUSED", "sampling.stop"),
        ("Chat", ask(LONG), BAD, "PROMPT_TOO_LONG", "messages"),
        ("Chat", ask(n=2, temperature=1.0), BAD, "ONE_ANSWER_PER_CHAT", "sampling.n"),
    ],
)
async def test_calls_are_refused_with_reason_and_field(
    served: Served, method: str, asked: Any, code: grpc.StatusCode, reason: str, field: str
) -> None:
    error = await refused(served.chat(asked) if method == "Chat" else served.call(method, asked))
    assert (error.code, error.reason, list(error.fields)) == (code, reason, [field] if field else [])


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/completions", {"prompt": [1, 999_999]}, "prompt_invalid", "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt_invalid", "prompt"),
        ("/v1/completions", {"prompt": LONG}, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"prompt": "Hi", "stop": ""}, None, None),
        ("/v1/completions", {"prompt": "Hi", "stop": [""]}, "request_refused", "stop"),
        ("/v1/chat/completions", {"messages": LONG_TALK}, "context_length_exceeded", "messages"),
        ("/v1/chat/completions", {"messages": TALK, "n": 2, "temperature": 0}, "greedy_with_n", "n"),
        ("/v1/chat/completions", {"messages": TALK, "tools": [TOOL]}, "tools_not_supported", "tools"),
        ("/v1/chat/completions", {"messages": TALK, "user": "x" * 17 * 2**20}, "body_too_large", None),
        ("/generate", {"prompt": "x" * 17 * 2**20}, "body_too_large", None),
    ],
)  # fmt: skip
async def test_questions_over_http_are_refused_with_code_and_parameter(
    served: Served, path: str, body: Any, code: str | None, param: str | None
) -> None:
    asked = {"model": "toy", "max_tokens": 3, **body}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {served.key}"}, timeout=60) as client:
        told = await client.post(served.http + path, json=asked)
    if code is None:
        assert told.status_code == 200, told.text
        return
    error = told.json()["error"]
    assert (told.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["message"]


async def test_several_answers_to_one_turn_of_a_session_are_refused(served: Served) -> None:
    body = {"messages": TALK, "session": "session-x", "n": 2, "temperature": 1}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {served.key}"}, timeout=60) as client:
        told = await client.post(f"{served.http}/v1/chat/completions", json=body)
    assert (told.status_code, told.json()["error"]["code"]) == (400, "one_answer_per_chat")


async def test_a_body_too_large_that_should_hold_the_key_is_refused(served: Served) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        told = await client.post(f"{served.http}/generate", json={"prompt": "x" * 17 * 2**20, "api_key": served.key})
    assert (told.status_code, told.json()["error"]["code"]) == (400, "body_too_large")


async def test_what_only_the_engine_refuses_is_typed(served: Served, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.component.extra["host"].serving().engine
    selkie = served.platform.library.publish(ADAPTER, "selkie", toy.adapters["selkie"]).ref

    async def refuse(self: CountingEngine, internal_name: str, folder: Path) -> None:
        raise EngineRefused("target module q_proj is not supported")

    with monkeypatch.context() as patched:
        patched.setattr(CountingEngine, "load_adapter", refuse)
        error = await refused(served.call("LoadAdapter", pb.LoadAdapterRequest(adapter=selkie)))
    assert (error.code, error.reason) == (UNMET, "ENGINE_REFUSED_ADAPTER")
    assert "q_proj is not supported" in error.message and error.metadata["adapter"] == "adapter/selkie:v1"
    loaded = (await served.call("LoadAdapter", pb.LoadAdapterRequest(adapter=selkie))).model
    with monkeypatch.context() as patched:
        patched.delitem(engine.adapters, loaded.internal_name)  # the engine lost it
        error = await refused(served.chat(ask(model="selkie")))
    assert (error.code, error.reason, list(error.fields)) == (BAD, "REQUEST_REFUSED", ["sampling"])
    assert "is not loaded" in error.message
    assert (await served.chat(ask(model="selkie")))[0].model == "selkie:v1"


def tokenizer_of_nothing(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}}')


def blanks_are_stripped(folder: Path) -> None:
    def edit(name: str, **values: Any) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    edit("tokenizer.json", normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
    edit("config.json", model_type="granite")  # for Qwen's the library puts a normalizer of its own in its place


def template(text: str) -> Any:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return write


SLOW = "{% for a in range(300) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("change", "method", "asked", "code", "reason"),
    [
        (tokenizer_of_nothing, "LoadModel", None, UNMET, "TOKENIZER_UNREADABLE"),
        (blanks_are_stripped, "Generate", completion("   "), BAD, "PROMPT_EMPTY"),
        (template("{{ raise_exception('first the captain') }}"), "Chat", ask(), BAD, "TEMPLATE_REFUSED"),
        (template(SLOW), "Chat", ask(), UNMET, "TEMPLATE_TOO_SLOW"),
        (without_template, "Chat", ask(), UNMET, "NO_CHAT_TEMPLATE"),
    ],
)
async def test_models_whose_prompts_cannot_be_made(
    served: Served,
    toy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    method: str,
    asked: Any,
    code: grpc.StatusCode,
    reason: str,
) -> None:
    monkeypatch.setattr(chat_format, "RENDER_SECONDS", 0.05 if reason == "TEMPLATE_TOO_SLOW" else 60)
    folder = Path(shutil.copytree(toy.model, tmp_path / "odd"))
    change(folder)
    model = served.platform.library.publish(MODEL, f"odd-{tmp_path.name.lower().replace('_', '-')}"[:60], folder).ref
    loading = served.call("LoadModel", pb.LoadModelRequest(model=BaseModel(artifact=model)))
    try:
        if method == "LoadModel":
            error = await refused(loading)
        else:
            await loading
            error = await refused(served.chat(asked) if method == "Chat" else served.call(method, asked))
    finally:
        await served.call("LoadModel", pb.LoadModelRequest(model=BaseModel(artifact=TOY)))
    assert (error.code, error.reason) == (code, reason)
    if reason == "TEMPLATE_REFUSED":
        assert "first the captain" in error.message
    assert (await served.chat(ask()))[0].model == "toy"


async def test_sessions_keep_the_times_and_turns_of_the_settings(served: Served) -> None:
    def kept(session: pb.Session) -> timedelta:
        return session.expire_time.ToDatetime() - session.create_time.ToDatetime()

    usual = (await served.call("CreateSession", pb.CreateSessionRequest())).session
    longest = (await served.call("CreateSession", pb.CreateSessionRequest(ttl=Duration(seconds=200)))).session
    assert (kept(usual), kept(longest)) == (timedelta(seconds=100), timedelta(seconds=200))
    error = await refused(served.call("CreateSession", pb.CreateSessionRequest(ttl=Duration(seconds=201))))
    assert (error.code, error.reason, list(error.fields)) == (BAD, "SESSION_TTL_INVALID", ["ttl"])
    assert "200" in error.message
    for _ in range(2):
        assert (await served.chat(ask("Hi", session=usual.name, max_tokens=2)))[-1].finish_reason
    error = await refused(served.chat(ask("Hi", session=usual.name, max_tokens=2)))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_FULL")
    await served.call("ResetSession", pb.ResetSessionRequest(name=usual.name))
    assert await served.chat(ask("Hi", session=usual.name, max_tokens=2))
