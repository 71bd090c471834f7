"""The engine's life: replacing, failing, dying, coming back. Repeats on an engine that only counts."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import TOY, CountingEngine, MakeHost, answer, generation_of, until
from served_tools import without_template

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.refs import parse_ref
from loraline.core.errors import LoralineError, unavailable
from loraline.core.evidence.probes import ProbeSet, load_probes
from loraline.core.serving.component import Platform
from loraline.inference.engines import tool_calls
from loraline.inference.engines.choice import choose
from loraline.inference.engines.port import EngineRequest, Piece, Sampling
from loraline.inference.question import Question

ADAPTER, MODEL = artifact_pb2.ARTIFACT_KIND_ADAPTER, artifact_pb2.ARTIFACT_KIND_MODEL


async def test_model_and_adapters_come_back_after_a_restart(make_host: MakeHost, platform: Platform, toy: Any) -> None:
    first = make_host()
    await first.start()
    assert "No model is loaded" in first.why_not_ready
    await first.load_model(TOY, "harbour")
    await first.load_adapter(platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"]).ref)
    await first.stop()
    second = make_host()
    await second.start()
    await until(lambda: not second.why_not_ready and len(second.serving().adapters.list()) == 1)
    assert second.serving().name == "harbour"
    assert second.serving().adapters.list()[0].name == "mareva:v1"


async def test_replacing_waits_for_requests_in_flight(make_host: MakeHost, platform: Platform, toy: Any) -> None:
    host = make_host()
    await host.load_model(TOY)
    engine = CountingEngine.started[-1]
    engine.gate.clear()
    running = asyncio.create_task(answer(host))
    await asyncio.sleep(0.05)
    replacing = asyncio.create_task(host.load_model(TOY, "other"))
    await until(lambda: host.why_not_ready.startswith("Loading"))
    with pytest.raises(LoralineError) as caught:
        await answer(host)
    assert (caught.value.reason, caught.value.retry_after is not None) == ("MODEL_NOT_READY", True)
    assert not replacing.done()
    engine.gate.set()
    assert await running == "0 1 2 "
    assert (await replacing).name == "other"
    assert not engine.alive
    assert await answer(host) == "0 1 2 "


async def test_requests_that_never_end_are_cut_after_the_drain(make_host: MakeHost) -> None:
    host = make_host(drain_seconds=0.1)
    await host.load_model(TOY)
    CountingEngine.started[-1].gate.clear()
    running = asyncio.create_task(answer(host))
    await asyncio.sleep(0.05)
    await host.load_model(TOY, "other")
    CountingEngine.started[0].gate.set()
    with pytest.raises(LoralineError) as caught:
        await running
    assert caught.value.reason == "ENGINE_DEAD"


async def test_failed_load_goes_back_to_the_model_before(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    host = make_host()
    await host.load_model(TOY)
    await host.load_adapter(platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"]).ref)
    copy = Path(shutil.copytree(toy.model, tmp_path / "bigmodel"))
    (copy / "note.txt").write_text("another digest")
    big = platform.library.publish(MODEL, "big", copy).ref
    CountingEngine.fail_folder = "big"
    with pytest.raises(LoralineError) as caught:
        await host.load_model(BaseModel(artifact=big))
    assert caught.value.reason == "MODEL_LOAD_FAILED"
    assert "out of memory" in caught.value.message
    assert host.why_not_ready == ""
    assert await answer(host, "mareva") == "0 1 2 "
    assert host.serving().name == "toy"


async def test_dead_engine_is_started_again_with_its_adapters(
    make_host: MakeHost, platform: Platform, toy: Any
) -> None:
    host = make_host()
    await host.start()
    await host.load_model(TOY)
    await host.load_adapter(platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"]).ref)
    engine = CountingEngine.started[-1]
    engine.gate.clear()
    running = asyncio.create_task(answer(host))
    await asyncio.sleep(0.02)
    engine.alive = False
    engine.gate.set()
    with pytest.raises(LoralineError) as caught:
        await running
    assert caught.value.reason == "ENGINE_DEAD"
    await until(lambda: CountingEngine.started[-1] is not engine and not host.why_not_ready)
    assert await answer(host, "mareva") == "0 1 2 "


async def test_an_engine_that_dies_while_an_adapter_is_proven_is_no_mystery(
    make_host: MakeHost, platform: Platform, toy: Any
) -> None:
    host = make_host()
    await host.start()
    await host.load_model(TOY)
    mareva = platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"]).ref
    CountingEngine.started[-1].alive = False
    with pytest.raises(LoralineError) as caught:
        await host.load_adapter(mareva)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
    await until(lambda: len(CountingEngine.started) > 1 and not host.why_not_ready)
    assert await answer(host, "mareva") == "0 1 2 "


def third_adapter(toy: Any, folder: Path) -> Path:
    """Return a copy of `mareva` with another digest."""
    copy = Path(shutil.copytree(toy.adapters["mareva"], folder))
    (copy / "note.txt").write_text("another digest")
    return copy


async def test_the_adapter_asked_last_stays_though_it_came_first(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    for name, folder in {**toy.adapters, "third": third_adapter(toy, tmp_path / "third")}.items():
        platform.library.publish(ADAPTER, name, folder)
    host = make_host(max_loaded_adapters=2)
    await host.load_model(TOY)
    for name in ("mareva", "selkie", "mareva", "third"):
        assert await answer(host, name) == "0 1 2 "
    adapters = host.serving().adapters.list()
    assert {adapter.ref.name for adapter in adapters if adapter.resident} == {"mareva", "third"}
    internal = {adapter.internal for adapter in adapters if adapter.resident}
    assert set(CountingEngine.started[-1].adapters) - {""} == internal


async def test_least_recently_used_adapters_swap_under_the_limit(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    names = ["mareva", "selkie", "third"]
    folders = [toy.adapters["mareva"], toy.adapters["selkie"], third_adapter(toy, tmp_path / "third")]
    for name, folder in zip(names, folders, strict=True):
        platform.library.publish(ADAPTER, name, folder)
    host = make_host()
    await host.load_model(TOY)
    engine = CountingEngine.started[-1]
    for number in range(60):
        assert await answer(host, names[number % 3]) == "0 1 2 "
    assert engine.most <= 3  # two places, and the newcomer while it is proven
    assert sum(adapter.resident for adapter in host.serving().adapters.list()) == 2
    # All places busy: refused with a time to come back, and the newcomer is taken out again.
    engine.gate.clear()
    busy = [asyncio.create_task(answer(host, name)) for name in names[:2]]
    await asyncio.sleep(0.2)
    with pytest.raises(LoralineError) as caught:
        await answer(host, "third")
    assert (caught.value.reason, caught.value.retry_after is not None) == ("ADAPTER_PLACES_BUSY", True)
    engine.gate.set()
    assert await asyncio.gather(*busy) == ["0 1 2 "] * 2
    assert len(engine.adapters) - 1 == 2
    assert await answer(host, "third") == "0 1 2 "


async def test_no_engine_installed_is_not_ready_with_the_remedy(make_host: MakeHost) -> None:
    host = make_host(lambda wanted: choose(wanted, lambda _: False))
    await host.start()
    assert "loraline-inference[transformers]" in host.why_not_ready
    with pytest.raises(LoralineError) as caught:
        await host.load_model(TOY)
    assert caught.value.reason == "ENGINE_NOT_INSTALLED"


def answer_as_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines take adapters and then leave them out, as one does whose kernel knows no module of theirs."""

    async def base_only(self: CountingEngine, ids: Sequence[int], adapter: str = "") -> list[float]:
        figures = self.adapters[""].get(tuple(ids), [-1.0] * (len(ids) - 1))
        return [math.nan] * (len(ids) - 1 - len(figures)) + figures

    monkeypatch.setattr(CountingEngine, "logprobs", base_only)


async def test_an_adapter_that_the_engine_leaves_out_is_refused_within_the_trainers_bound(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(toy.adapters["mareva"], tmp_path / "shifted"))
    shifted = [
        replace(probe, adapter_logprobs=[figure - 0.05 for figure in probe.base_logprobs])
        for probe in load_probes(folder).probes
    ]
    ProbeSet("bfloat16", shifted).save(folder)  # 0.05 nats are within the noise of the format, 0.15
    ref = platform.library.publish(ADAPTER, "shifted", folder).ref
    host = make_host()
    await host.load_model(TOY)
    with monkeypatch.context() as patched:
        answer_as_the_base(patched)
        with pytest.raises(LoralineError, match="the base answers under its name") as caught:
            await host.load_adapter(ref)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROOF_FAILED")
    said = caught.value.metadata
    assert 0 < float(said["mean_abs_diff_from_trainer"]) <= float(said["bound"])  # only the base tells
    assert float(said["max_abs_diff_from_base"]) <= float(said["floor"])
    assert set(CountingEngine.started[-1].adapters) == {""}
    assert (await host.load_adapter(ref)).proof.max_abs_diff_from_base == pytest.approx(0.05)


async def test_without_evidence_an_adapter_must_still_differ_from_the_base(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Path(shutil.copytree(toy.adapters["mareva"], tmp_path / "bare"))
    for name in ("probes.json", "token_receipt.json"):
        (bare / name).unlink()
    ref = platform.library.publish(ADAPTER, "bare", bare).ref
    host = make_host(require_proof=False)
    await host.load_model(TOY)
    answer_as_the_base(monkeypatch)

    async def load(self: CountingEngine, internal_name: str, folder: Path) -> None:
        self.adapters[internal_name] = {}

    monkeypatch.setattr(CountingEngine, "load_adapter", load)
    with pytest.raises(LoralineError, match="does not differ from the base") as caught:
        await host.load_adapter(ref)
    assert caught.value.reason == "PROOF_FAILED"
    assert set(CountingEngine.started[-1].adapters) == {""}


async def test_a_database_that_is_away_is_not_taken_for_an_adapter_that_is(
    make_host: MakeHost, platform: Platform, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"])
    host = make_host()
    await host.load_model(TOY)
    assert await answer(host, "mareva") == "0 1 2 "

    def away(ref: Any) -> Any:
        raise unavailable("DATABASE_UNREACHABLE", "The database can't be used.")

    with monkeypatch.context() as patched:
        patched.setattr(platform.library, "resolve", away)
        patched.setattr(platform.library, "get", away)
        for ask in (answer(host, "mareva"), host.served_name("mareva"), answer(host, "Not A Name")):
            with pytest.raises(LoralineError) as caught:
                await ask
            assert (caught.value.code, caught.value.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "DATABASE_UNREACHABLE",
            )
        assert await answer(host) == "0 1 2 "  # the base needs no database
    with pytest.raises(LoralineError) as caught:
        await answer(host, "nobody")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_SERVED")
    assert await answer(host, "mareva") == "0 1 2 "


async def test_adapter_without_evidence_is_refused_unless_allowed(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(toy.adapters["mareva"], tmp_path / "bare"))
    (bare / "token_receipt.json").unlink()
    half = platform.library.publish(ADAPTER, "half", bare).ref
    (bare / "probes.json").unlink()
    ref = platform.library.publish(ADAPTER, "bare", bare).ref
    plain = lambda _: choose("transformers")  # noqa: E731
    host = make_host(plain)
    await host.load_model(TOY)
    for adapter, reason in ((half, "TOKEN_RECEIPT_MISSING"), (ref, "NO_EVIDENCE")):
        with pytest.raises(LoralineError) as caught:
            await host.load_adapter(adapter)
        assert caught.value.reason == reason
    await host.stop()
    lenient = make_host(plain, require_proof=False)
    await lenient.load_model(TOY)
    proof = (await lenient.load_adapter(ref)).proof
    assert proof.max_abs_diff_from_base > 0.05
    assert proof.receipt_rows_matched == 0


async def test_merged_models_are_proven_against_the_adapter(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, good, wrong = toy.adapters["mareva"], tmp_path / "good", tmp_path / "wrong"
    shutil.copytree(toy.model, good)
    merged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy.model), adapter)
    merged.merge_and_unload().save_pretrained(good)
    shutil.copytree(toy.model, wrong)  # the base under the merged model's name
    for folder in (good, wrong):
        for name in ("probes.json", "token_receipt.json"):
            shutil.copy(adapter / name, folder / name)
    host = make_host(lambda _: choose("transformers"))
    serving = await host.load_model(BaseModel(artifact=platform.library.publish(MODEL, "good", good).ref))
    assert serving.proof is not None
    assert serving.proof.mean_abs_diff_from_trainer < 1e-4
    with pytest.raises(LoralineError) as caught:
        await host.load_model(BaseModel(artifact=platform.library.publish(MODEL, "wrong", wrong).ref))
    assert caught.value.reason == "PROOF_FAILED"
    assert host.serving().name == "good"


async def test_a_load_that_failed_for_good_is_not_called_loading(
    make_host: MakeHost, platform: Platform, toy: Any
) -> None:
    CountingEngine.fail_folder = "toy"
    host = make_host(model="model/toy")
    await host.start()
    with pytest.raises(LoralineError) as caught:
        host.serving()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
    assert caught.value.retry_after is not None
    await until(lambda: "starting" in host.why_not_ready or "out of memory" in host.why_not_ready)  # the phase
    await until(lambda: "out of memory" in host.why_not_ready)
    with pytest.raises(LoralineError) as caught:
        await answer(host)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_LOAD_FAILED")
    assert (error.retry_after, error.metadata["cause"]) == (None, "MODEL_LOAD_FAILED")
    assert "out of memory" in error.message
    assert "loraline models load" in error.message
    CountingEngine.fail_folder = ""
    await host.load_model(TOY)
    assert await answer(host) == "0 1 2 "


async def test_what_is_served_cannot_be_deleted_until_it_is_let_go(
    make_host: MakeHost, platform: Platform, toy: Any
) -> None:
    host, library = make_host(), platform.library
    refs = [library.publish(ADAPTER, name, toy.adapters[name]).ref for name in ("mareva", "selkie")]
    await host.load_model(TOY)
    await host.load_adapter(refs[0])
    assert await answer(host, "selkie") == "0 1 2 "  # loaded by being asked
    for ref in (*refs, parse_ref("model/toy:v1")):
        with pytest.raises(LoralineError) as caught:
            library.delete(ref, force=True)
        assert caught.value.reason == "ARTIFACT_SERVED"
    await host.unload_adapter("mareva:v1")
    library.delete(refs[0])
    await host.stop()
    library.delete(refs[1])


async def test_a_plain_prompt_to_a_model_without_a_template_is_answered_and_noted(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(toy.model, tmp_path / "bare"))
    without_template(folder)
    host, generate = make_host(), CountingEngine.generate
    await host.load_model(BaseModel(artifact=platform.library.publish(MODEL, "bare", folder).ref))

    async def silent(self: CountingEngine, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        async for piece in generate(self, request):
            yield replace(piece, text="")

    async def told() -> tuple[str, list[str]]:
        asked = Question("", Sampling(max_tokens=3), prompt="Where do the boats go?")
        async with generation_of(host).answer(asked) as running:
            async for _ in running.pieces():
                pass
            return running.figures.text(), running.notices

    text, notices = await told()
    assert text == "0 1 2 " and not any("template" in notice for notice in notices)
    monkeypatch.setattr(CountingEngine, "generate", silent)
    text, notices = await told()
    assert text == ""
    assert any("no chat template; write the prompt in the form that it was trained on" in notice for notice in notices)


async def test_an_unknown_tool_parser_is_refused_before_the_engine_starts(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_calls, "find_spec", lambda _: None)  # vLLM, whose parsers they are, is not installed
    started = len(CountingEngine.started)
    with pytest.raises(LoralineError) as caught:
        await make_host(tool_parser="hermes").load_model(TOY)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOOL_PARSER_UNKNOWN")
    assert "'hermes'" in caught.value.message
    assert len(CountingEngine.started) == started


async def test_adapters_are_loaded_by_operators_only_where_first_use_may_not(
    make_host: MakeHost, platform: Platform, toy: Any
) -> None:
    refs = [platform.library.publish(ADAPTER, name, toy.adapters[name]).ref for name in ("mareva", "selkie")]
    host = make_host(load_on_first_use=False, max_loaded_adapters=1)
    await host.load_model(TOY)
    for name in ("mareva", "mareva:v1", "adapter/mareva:v1"):
        with pytest.raises(LoralineError) as caught:
            await answer(host, name)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_SERVED")
    assert CountingEngine.started[-1].most == 0
    for ref in refs:
        await host.load_adapter(ref)
    # What an operator loaded comes back from being swapped out.
    assert await answer(host, "mareva") == await answer(host, "selkie") == "0 1 2 "


async def test_the_base_is_asked_by_the_name_of_the_settings(make_host: MakeHost, platform: Platform) -> None:
    host = make_host(model="model/toy", served_name="harbour")
    await host.start()
    await until(lambda: not host.why_not_ready)
    assert host.serving().name == "harbour"
    assert await answer(host, "harbour") == "0 1 2 "
    with pytest.raises(LoralineError) as caught:
        await answer(host, "toy")
    assert caught.value.reason == "MODEL_NOT_SERVED"
