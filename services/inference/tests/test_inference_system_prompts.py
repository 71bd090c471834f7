"""System prompts by model name: where they go in, where not, and who is told that one is missing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counting_engine import TOY, CountingChoice, CountingEngine, MakeHost
from prometheus_client import CollectorRegistry

from loraline.api.artifact.v1 import artifact_pb2
from loraline.core.errors import LoralineError
from loraline.core.evidence.receipt import ReceiptRow, load_receipt
from loraline.core.serving.component import Platform
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.port import EngineRequest, Piece, Sampling
from loraline.inference.generation import Generation
from loraline.inference.host import ModelHost
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.question import Question
from loraline.inference.sessions.metrics import SessionMetrics
from loraline.inference.sessions.store import SessionStore
from loraline.inference.sessions.turns import Sessions
from loraline.inference.system_prompts import SystemPrompts

ADAPTER = artifact_pb2.ARTIFACT_KIND_ADAPTER
PROMPTS = """
toy: Of the base.
mareva: "Of any version."
mareva:v2: Of the second.
mareva@production: |
  Of the one in use.
"""
HELLO = [{"role": "user", "content": "Hello"}]


class Seeing(CountingEngine):
    """Keeps the prompt that it saw last."""

    prompt: list[int]

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        Seeing.prompt = list(request.prompt_ids)
        async for piece in super().generate(request):
            yield piece


class SeeingChoice(CountingChoice):
    def create(self) -> Any:
        return Seeing()


@pytest.fixture
def chat_format(toy: Any) -> ChatFormat:
    return ChatFormat.load(toy.model)


@pytest.fixture
def with_system(toy: Any, tmp_path: Path, copy_adapter: Callable[[Path, Path], Path], chat_format: ChatFormat) -> Path:
    """An adapter whose training rows begin with a system prompt."""
    folder = copy_adapter(toy.adapters["mareva"], tmp_path / "with-system")
    receipt = load_receipt(folder)
    rows = []
    for row in receipt.rows:
        messages = [{"role": "system", "content": "You are Mareva."}, *row.messages]
        ids = chat_format.render(messages, generation_prompt=False)
        rows.append(ReceiptRow(row.source, messages, ids, [1] * len(ids)))
    replace(receipt, rows=rows).save(folder)
    return folder


async def opened(make_host: MakeHost, tmp_path: Path, text: str = PROMPTS) -> ModelHost:
    file = tmp_path / "prompts.yaml"
    file.write_text(text)
    host = make_host(lambda _: SeeingChoice("transformers", "test"), system_prompts_file=file)
    await host.load_model(TOY)
    return host


def generation_of(host: ModelHost, sessions: Sessions | None = None) -> Generation:
    return Generation(host, host.settings, InferenceMetrics(CollectorRegistry()), sessions)


async def notices(generation: Generation, model: str, messages: list[dict[str, str]], **more: Any) -> list[str]:
    question = Question(model, Sampling(max_tokens=2), messages=messages, **more)
    async with generation.answer(question) as running:
        async for _ in running.pieces():
            pass
        return [notice for notice in running.notices if "system prompt" in notice]


@pytest.mark.asyncio
async def test_the_nearest_name_counts(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path, chat_format: ChatFormat
) -> None:
    host = await opened(make_host, tmp_path)
    first = platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"]).ref
    platform.library.publish(ADAPTER, "mareva", toy.adapters["selkie"])
    platform.library.publish(ADAPTER, "selkie", toy.adapters["selkie"])
    await host.set_alias(first, "production", "test")
    generation = generation_of(host)
    for model, text in {
        "": "Of the base.",
        "toy": "Of the base.",
        "mareva:v1": "Of any version.",
        "mareva": "Of the second.",
        "mareva:v2": "Of the second.",
        "mareva@production": "Of the one in use.\n",
        "selkie": "",
    }.items():
        await notices(generation, model, HELLO)
        system = [{"role": "system", "content": text}] if text else []
        assert Seeing.prompt == chat_format.render([*system, *HELLO], generation_prompt=True), model


@pytest.mark.asyncio
async def test_what_brings_its_own_or_is_no_conversation_is_left_alone(
    make_host: MakeHost, tmp_path: Path, chat_format: ChatFormat
) -> None:
    host = await opened(make_host, tmp_path)
    generation = generation_of(host)
    own = [{"role": "system", "content": "Mine."}, *HELLO]
    await notices(generation, "toy", own)
    assert Seeing.prompt == chat_format.render(own, generation_prompt=True)
    async with generation.answer(Question("toy", Sampling(max_tokens=1), prompt="Hello")) as running:
        async for _ in running.pieces():
            pass
    assert Seeing.prompt == chat_format.encode("Hello")


@pytest.mark.asyncio
async def test_a_session_without_a_prompt_of_its_own_gets_it_too(
    make_host: MakeHost, platform: Platform, tmp_path: Path, chat_format: ChatFormat
) -> None:
    host = await opened(make_host, tmp_path)
    store = SessionStore(platform.database, host.settings.session_limits())
    generation = generation_of(host, Sessions(store, SessionMetrics(CollectorRegistry(), store.count)))
    for prompt, text in (("", "Of the base."), ("Of the session.", "Of the session.")):
        name = store.create("", "", "", prompt, 60).name
        await notices(generation, "", HELLO, session=name)
        system = [{"role": "system", "content": text}]
        assert Seeing.prompt == chat_format.render([*system, *HELLO], generation_prompt=True)


@pytest.mark.asyncio
async def test_refusals_count_the_callers_messages(make_host: MakeHost, tmp_path: Path) -> None:
    host = await opened(make_host, tmp_path)
    with pytest.raises(LoralineError) as refused:
        await notices(generation_of(host), "toy", [{"role": "user", "content": "<|im_end|>"}])
    assert list(refused.value.fields) == ["messages[0].content"]


@pytest.mark.asyncio
async def test_a_model_trained_with_a_system_prompt_says_that_it_misses_one(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path, with_system: Path
) -> None:
    for name, folder in (("told", with_system), ("plain", toy.adapters["mareva"]), ("set", with_system)):
        platform.library.publish(ADAPTER, name, folder)
    host = await opened(make_host, tmp_path, "set: You are Mareva.\n")
    generation = generation_of(host)
    assert await notices(generation, "told", HELLO) == [
        "told:v1 was trained with a system prompt and this conversation has none: its answers may be unlike those in "
        "training. Send the one it was trained with."
    ]
    assert await notices(generation, "told", [{"role": "system", "content": "You are Mareva."}, *HELLO]) == []
    assert await notices(generation, "plain", HELLO) == []
    assert await notices(generation, "set", HELLO) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"- a list", "it must hold one mapping"),
        (b"toy: [1]", "'toy' must be a model name with a text"),
        (b"toy: ' '", "'toy' must be a model name with a text"),
        (b"1: text", "1 must be a model name"),
        (b"'': text", "'' must be a model name"),
        (b"toy: 'open", "it is no YAML"),
        (b"\xff\xfe\xff", "it cannot be read"),
        (b"# " + b"x" * 1024 * 1024, "it is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_bytes(content)
    with pytest.raises(LoralineError, match=why) as refused:
        SystemPrompts.load(file)
    assert refused.value.reason == "SYSTEM_PROMPTS_INVALID"
    assert "prompts.yaml" in refused.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoralineError, match=r"none\.yaml: it cannot be read"):
        SystemPrompts.load(tmp_path / "none.yaml")
