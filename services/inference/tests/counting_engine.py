"""An engine that only counts, for faults and repeats: what the real one does is tested on the real one."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry

from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.refs import parse_ref
from loraline.core.evidence.probes import load_probes
from loraline.inference.engines.choice import EngineChoice
from loraline.inference.engines.port import (
    EngineDead,
    EngineFacts,
    EngineOptions,
    EngineRefused,
    EngineRequest,
    Piece,
    Sampling,
)
from loraline.inference.generation import Generation
from loraline.inference.host import ModelHost
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.question import Question

MakeHost = Callable[..., ModelHost]
TOY = BaseModel(artifact=parse_ref("model/toy:v1"))


class CountingEngine:
    """Answers `0 1 2 …`; its log-probabilities are those that the adapters' probes ask for."""

    started: ClassVar[list[CountingEngine]] = []
    fail_folder: ClassVar[str] = ""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[tuple[int, ...], list[float]]] = {"": {}}
        self.most = 0
        self.alive = False
        self.running = 0
        """Requests that generate now."""
        self.words = ""
        """What it says when it is dead."""
        self.gate = asyncio.Event()
        self.gate.set()
        CountingEngine.started.append(self)

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts("transformers", "0", "cpu", "float32", 512, 400, 16, 2)

    async def start(self, model_folder: Path, options: EngineOptions) -> None:
        if self.fail_folder and self.fail_folder in str(model_folder):
            raise RuntimeError("CUDA error: out of memory")
        self.alive = True

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        if request.adapter not in self.adapters:
            raise EngineRefused(f"adapter {request.adapter} is not loaded")
        self.running += 1
        try:
            for number in itertools.count():
                await self.gate.wait()
                await asyncio.sleep(0)
                if not self.alive:
                    raise EngineDead("killed")
                last = number + 1 == request.sampling.max_tokens
                for index in range(request.sampling.n):
                    yield Piece(index, f"{number} ", [number], "length" if last else "")
                if last:
                    return
        finally:
            self.running -= 1

    async def load_adapter(self, internal_name: str, folder: Path) -> None:
        probes = load_probes(folder).probes
        self.adapters[internal_name] = {(*p.prompt_ids, *p.response_ids): p.adapter_logprobs for p in probes}
        self.adapters[""].update({(*p.prompt_ids, *p.response_ids): p.base_logprobs for p in probes})
        self.most = max(self.most, len(self.adapters) - 1)

    async def unload_adapter(self, internal_name: str) -> None:
        del self.adapters[internal_name]

    async def logprobs(self, ids: Sequence[int], adapter: str = "") -> list[float]:
        if not self.alive:
            raise EngineDead("killed")
        figures = self.adapters[adapter][tuple(ids)]
        return [math.nan] * (len(ids) - 1 - len(figures)) + figures

    async def healthy(self) -> bool:
        return self.alive

    def last_words(self) -> str:
        return self.words

    async def stop(self) -> None:
        self.alive = False
        self.gate.set()


class CountingChoice(EngineChoice):
    def create(self) -> Any:
        return CountingEngine()


def generation_of(host: ModelHost) -> Generation:
    """Return a generation with metrics of its own."""
    return Generation(host, host.settings, InferenceMetrics(CollectorRegistry()))


async def answer(host: ModelHost, model: str = "", tokens: int = 3, generation: Generation | None = None) -> str:
    """Return the answer to a prompt."""
    generation = generation or generation_of(host)
    async with generation.answer(Question(model, Sampling(max_tokens=tokens), prompt="Hello")) as running:
        async for _ in running.pieces():
            pass
        return running.figures.text()


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds; TimeoutError otherwise."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
