"""What a running engine died of is read, recognised, and told while it is started again and after."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from counting_engine import TOY, CountingChoice, CountingEngine, MakeHost, answer, generation_of, until
from failing_process import fail_in_mid_run, wait_for_ever

from loraline.api.inference.v1 import inference_pb2
from loraline.inference.engines import last_words
from loraline.inference.engines.vllm_process import how_it_ended
from loraline.inference.servicer import InferenceServicer

ASSERT = "RuntimeError: CUDA error: device-side assert triggered"
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
KILLED = "The engine's process EngineCore_0 was ended by signal 9 (Killed)"


@pytest.fixture
def listening() -> Iterator[None]:
    last_words.listen()
    yield
    last_words.forget()


def run(target: Callable[[], None], name: str = "EngineCore_0") -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, name=name)
    process.start()
    return process


def llm_of(process: Any) -> Any:
    """Return as much of vLLM's AsyncLLM as knows its processes."""
    from_vllm = SimpleNamespace(finished_procs=lambda: {process.name: process.exitcode})
    return SimpleNamespace(engine_core=SimpleNamespace(resources=SimpleNamespace(engine_manager=from_vllm)))


def test_the_cause_is_found_behind_what_vllm_dumps(listening: None) -> None:
    process = run(fail_in_mid_run)
    process.join(60)
    assert how_it_ended(llm_of(process)).splitlines()[0] == ASSERT


def test_the_file_of_a_killed_server_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read anew, here as in the process
    process = multiprocessing.get_context("spawn").Process(target=last_words.listen)
    process.start()
    process.join(60)
    (left,) = tmp_path.iterdir()  # it ended without a word, as one that is killed
    assert left.name.startswith(f"loraline-engine-{process.pid}-")
    alive = f"loraline-engine-{os.getppid()}-x.txt"
    others = [tmp_path / name for name in (alive, "loraline-engine-old.txt", "loraline-engine-99999999999-x.txt")]
    # A container that is started again gives its server the same process id.
    for file in (*others, tmp_path / f"loraline-engine-{os.getpid()}-x.txt"):
        file.touch()
    last_words.listen()
    named = Path(os.environ[last_words.VARIABLE])
    assert set(tmp_path.iterdir()) == {named, *others}
    last_words.forget()
    assert set(tmp_path.iterdir()) == set(others)


def test_a_dead_servers_file_that_cannot_be_removed_stops_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read anew, here as in the process
    process = multiprocessing.get_context("spawn").Process(target=last_words.listen)
    process.start()
    process.join(60)
    (left,) = tmp_path.iterdir()
    unlink = Path.unlink

    def of_another_user(self: Path, missing_ok: bool = False) -> None:
        if self == left:
            raise PermissionError(1, "Operation not permitted", str(self))  # as in a /tmp that is sticky
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", of_another_user)
    last_words.listen()
    assert set(tmp_path.iterdir()) == {left, Path(os.environ[last_words.VARIABLE])}
    last_words.forget()
    assert list(tmp_path.iterdir()) == [left]


def record(at: float, text: str) -> str:
    return json.dumps([at, text]) + "\n"


def test_what_it_refused_long_ago_is_not_what_it_died_of(listening: None) -> None:
    path = Path(os.environ[last_words.VARIABLE])
    now = time.time()
    old, cause, last = record(now - 600, "ValueError: no such adapter"), record(now - 2, ASSERT), record(now, "fatal")
    path.write_text(f'{old}{cause}{last}[17, "cut')
    assert last_words.said(at_the_end=True) == f"{ASSERT}\nfatal"
    assert last_words.said().startswith("ValueError: no such adapter")
    path.write_text(old)  # died without a word
    assert last_words.said(at_the_end=True) == ""


def test_the_file_of_a_long_life_stays_small(listening: None) -> None:
    path = Path(os.environ[last_words.VARIABLE])
    path.write_text(record(time.time(), "x" * 2**20))
    process = run(fail_in_mid_run)
    process.join(60)
    assert path.stat().st_size < 2000
    assert last_words.said().startswith(ASSERT)


def test_a_killed_process_that_said_nothing_is_named_by_its_signal(listening: None) -> None:
    Path(os.environ[last_words.VARIABLE]).write_text(record(time.time(), "ValueError: no such adapter"))
    process = run(wait_for_ever)
    process.kill()
    process.join(60)
    assert how_it_ended(llm_of(process)) == KILLED
    last_words.listen()
    process = run(wait_for_ever)
    process.terminate()  # as vLLM ends the others when one has died
    process.join(60)
    assert how_it_ended(llm_of(process)) == ""


class SlowToComeBack(CountingEngine):
    """An engine whose start waits until it may."""

    may_start = asyncio.Event()

    async def start(self, model_folder: Path, options: Any) -> None:
        await self.may_start.wait()
        await super().start(model_folder, options)


class SlowChoice(CountingChoice):
    def create(self) -> Any:
        return SlowToComeBack() if CountingEngine.started else CountingEngine()


async def told_by(host: Any) -> inference_pb2.GetCapabilitiesResponse:
    nothing: Any = None
    servicer = InferenceServicer(host, generation_of(host), nothing, nothing)
    return await servicer.GetCapabilities(inference_pb2.GetCapabilitiesRequest(), nothing)


@pytest.mark.parametrize(
    ("words", "reason", "why"),
    [
        (f"{ASSERT}\nmore", "DEVICE_SIDE_ASSERT", f"The engine died ({ASSERT}) and is being started again."),
        (OUT_OF_MEMORY, "CUDA_OUT_OF_MEMORY", f"The engine died ({OUT_OF_MEMORY[:-1]}) and is being started again."),
        (KILLED, "ENGINE_KILLED", f"The engine died ({KILLED}) and is being started again."),
        ("AssertionError: what?", "ENGINE_DEAD", "The engine died (AssertionError: what?) and is being started again."),
        ("", "ENGINE_DEAD", "The engine died and is being started again. Loading model/toy:v1"),
    ],
)
@pytest.mark.asyncio
async def test_a_running_engines_last_words_are_in_the_status(
    make_host: MakeHost, words: str, reason: str, why: str
) -> None:
    SlowToComeBack.may_start = asyncio.Event()
    host = make_host(lambda _: SlowChoice("transformers", "test"))
    await host.start()
    await host.load_model(TOY)
    dead = CountingEngine.started[-1]
    dead.words, dead.alive = words, False
    await until(lambda: "starting transformers" in host.why_not_ready)
    assert host.why_not_ready.startswith(why)
    told = await told_by(host)
    assert told.not_ready_because == host.why_not_ready
    assert [one.reason for one in told.diagnoses] == [reason]
    assert told.diagnoses[0].message.endswith(words or ".")
    assert all("→" in told.diagnoses[0].explanations[language] for language in ("en", "zh", "ko"))
    SlowToComeBack.may_start.set()
    await until(lambda: not host.why_not_ready)
    assert await answer(host) == "0 1 2 "
    # It runs again; that it died, and of what, is not forgotten with it.
    assert [one.reason for one in (await told_by(host)).diagnoses] == [reason]
    await host.load_model(TOY, "another")
    assert list((await told_by(host)).diagnoses) == []
