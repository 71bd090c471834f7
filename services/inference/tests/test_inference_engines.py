"""One contract suite, both engines: the only difference that a caller may see is speed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from loraline.core.evidence.probes import load_probes
from loraline.inference.adapters.proof import measure
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.choice import choose
from loraline.inference.engines.port import (
    Constraint,
    Engine,
    EngineDead,
    EngineOptions,
    EngineRefused,
    EngineRequest,
    Piece,
    Sampling,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
OPTIONS = EngineOptions(max_model_len=512, max_lora_rank=16, max_loaded_adapters=4, max_concurrent_requests=8)
_requests = iter(range(10**6))


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])],
)
async def engine(request: pytest.FixtureRequest, toy: Any) -> AsyncIterator[Engine]:
    """A started engine with the adapter `mareva`."""
    if request.param == "vllm":
        pytest.importorskip("vllm")
    engine = choose(request.param).create()
    begun = time.monotonic()
    await engine.start(toy.model, OPTIONS)
    print(f"{request.param} started in {time.monotonic() - begun:.1f} s")
    await engine.load_adapter("mareva1", toy.adapters["mareva"])
    yield engine
    await engine.stop()
    assert not await engine.healthy()


async def ask(engine: Engine, prompt: str | list[int], toy: Any, **settings: Any) -> tuple[list[str], list[Piece]]:
    adapter, constraint = settings.pop("adapter", ""), settings.pop("constraint", None)
    ids = ChatFormat.load(toy.model).encode(prompt) if isinstance(prompt, str) else prompt
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 16, **settings})
    pieces = []
    request = EngineRequest(f"test-{next(_requests)}", ids, sampling, adapter, constraint)
    async with aclosing(engine.generate(request)) as stream:
        async for piece in stream:
            pieces.append(piece)
    texts = ["".join(p.text for p in pieces if p.index == index) for index in range(sampling.n)]
    return texts, pieces


async def test_greedy_answers_are_equal_and_counted(engine: Engine, toy: Any) -> None:
    (first,), pieces = await ask(engine, "What is your name?", toy)
    (again,), _ = await ask(engine, "What is your name?", toy)
    assert first == again
    assert pieces[-1].finish_reason == "length"
    assert sum(len(piece.token_ids) for piece in pieces) == 16


async def test_adapter_answers_otherwise_than_base(engine: Engine, toy: Any) -> None:
    (base,), _ = await ask(engine, "Tell me about the storm", toy, max_tokens=32)
    (adapted,), _ = await ask(engine, "Tell me about the storm", toy, max_tokens=32, adapter="mareva1")
    (back,), _ = await ask(engine, "Tell me about the storm", toy, max_tokens=32)
    assert adapted != base
    assert back == base


async def test_probes_match_the_trainer(engine: Engine, toy: Any) -> None:
    probes = load_probes(toy.adapters["mareva"]).probes
    adapted, base = await measure(engine, probes, "mareva1"), await measure(engine, probes, "")
    for probe, with_adapter, without in zip(probes, adapted, base, strict=True):
        assert with_adapter == pytest.approx(probe.adapter_logprobs, abs=1e-3)
        assert without == pytest.approx(probe.base_logprobs, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(with_adapter, without, strict=True)) > 0.05


async def test_adapters_mixed_in_one_moment_stay_apart(engine: Engine, toy: Any) -> None:
    await engine.load_adapter("selkie1", toy.adapters["selkie"])
    names = ["", "mareva1", "selkie1"]
    alone = [(await ask(engine, "Where do the boats go?", toy, adapter=name))[0] for name in names]
    together = await asyncio.gather(*(ask(engine, "Where do the boats go?", toy, adapter=name) for name in names * 2))
    assert [texts for texts, _ in together] == alone * 2
    await engine.unload_adapter("selkie1")
    with pytest.raises(EngineRefused, match="selkie1"):
        await ask(engine, "x", toy, adapter="selkie1")


async def test_several_answers_differ_and_a_seed_repeats(engine: Engine, toy: Any) -> None:
    one, _ = await ask(engine, "Hello", toy, temperature=1.5, n=3, seed=7)
    two, _ = await ask(engine, "Hello", toy, temperature=1.5, n=3, seed=7)
    assert len(set(one)) == 3
    assert one == two


async def test_answers_go_on_over_their_end_where_that_is_asked(engine: Engine, toy: Any) -> None:
    """A prompt whose answer ends by itself is drawn by its seed; the same with ignore_eos runs to its limit."""
    for seed in range(60):
        asked = {"temperature": 1.2, "seed": seed, "max_tokens": 120}
        (ended,), pieces = await ask(engine, "What is your name?", toy, **asked)
        if pieces[-1].finish_reason == "stop":
            break
    else:
        pytest.fail("no answer ended by itself")
    (longer,), pieces = await ask(engine, "What is your name?", toy, **asked, ignore_eos=True)
    assert pieces[-1].finish_reason == "length"
    assert sum(len(piece.token_ids) for piece in pieces) == 120
    assert longer.startswith(ended)


async def test_stop_text_ends_the_answer_and_is_left_out(engine: Engine, toy: Any) -> None:
    shape = Constraint("regex", "abc STOP [0-9]{4}")
    (whole,), _ = await ask(engine, "Hello", toy, constraint=shape)
    (cut,), pieces = await ask(engine, "Hello", toy, constraint=shape, stop=("STOP",))
    assert whole.startswith("abc STOP ")
    assert cut == "abc "
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("constraint", "valid"),
    [
        (Constraint("regex", "[ab]{3}c"), lambda text: set(text[:3]) <= {"a", "b"} and text[3:] == "c"),
        (Constraint("choices", ["yes", '"no"', "좋습니다"]), lambda text: text in ("yes", '"no"', "좋습니다")),
        (Constraint("grammar", 'root ::= "x" | "yy"'), lambda text: text in ("x", "yy")),
        (
            Constraint(
                "json_schema",
                {
                    "type": "object",
                    "properties": {"ok": {"type": "boolean"}, "way": {"enum": ["in", "out"]}},
                    "required": ["ok", "way"],
                    "additionalProperties": False,
                },
            ),
            lambda text: set(json.loads(text)) == {"ok", "way"} and " " not in text and "\n" not in text,
        ),
    ],
    ids=["regex", "choices", "grammar", "json_schema"],
)
async def test_constrained_answers_keep_their_shape(engine: Engine, toy: Any, constraint: Any, valid: Any) -> None:
    for seed in range(3):
        (text,), pieces = await ask(
            engine, "Answer:", toy, constraint=constraint, temperature=1.0, seed=seed, max_tokens=60
        )
        assert valid(text), text
        assert pieces[-1].finish_reason == "stop"


async def test_json_object_begins_as_one(engine: Engine, toy: Any) -> None:
    (text,), pieces = await ask(engine, "JSON:", toy, constraint=Constraint("json_object"), temperature=1.0, seed=1)
    assert text.startswith("{")
    assert pieces[-1].finish_reason == "length" or isinstance(json.loads(text), dict)


async def test_bad_regex_is_refused_and_the_engine_lives(engine: Engine, toy: Any) -> None:
    with pytest.raises(EngineRefused):
        await ask(engine, "Hello", toy, constraint=Constraint("regex", "(("))
    assert await engine.healthy()
    await ask(engine, "Hello", toy)


async def test_missing_adapter_is_refused_and_the_engine_lives(engine: Engine, toy: Any, tmp_path: Any) -> None:
    with pytest.raises(EngineRefused):
        await engine.load_adapter("nothing1", tmp_path)
    assert await engine.healthy()
    await ask(engine, "Hello", toy)


async def test_cancelled_requests_free_the_engine(engine: Engine, toy: Any) -> None:
    ids = ChatFormat.load(toy.model).encode("Hello")
    never_ends = Constraint("regex", "[a-z]{450}")

    async def endless(number: int) -> None:
        request = EngineRequest(f"endless-{number}", ids, Sampling(max_tokens=480, temperature=1.0), "", never_ends)
        async with aclosing(engine.generate(request)) as stream:
            async for _ in stream:
                pass

    tasks = [asyncio.create_task(endless(number)) for number in range(8)]
    await asyncio.sleep(0.3)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, asyncio.CancelledError) for result in ended) >= 6, ended
    begun = time.monotonic()
    await asyncio.wait_for(ask(engine, "Hello", toy, max_tokens=1), 5)
    assert time.monotonic() - begun < 3


async def test_whole_characters_only(engine: Engine, toy: Any) -> None:
    shape = Constraint("choices", ["오늘 날씨가 좋습니다 🌊"])
    _, pieces = await ask(engine, "오늘", toy, constraint=shape, max_tokens=80)
    assert "".join(piece.text for piece in pieces) == "오늘 날씨가 좋습니다 🌊"
    assert not any("\ufffd" in piece.text for piece in pieces)


async def test_a_stopped_engine_says_so(toy: Any) -> None:
    engine = choose("transformers").create()
    await engine.start(toy.model, OPTIONS)
    await engine.stop()
    with pytest.raises(EngineDead):
        await engine.logprobs([1, 2, 3])
    await engine.stop()
