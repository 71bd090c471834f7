"""The last stages: put the result into service, and ask it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.inference.v1 import inference_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.aio import AsyncLoraline
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.plan import describe_base
from loraline.client.pipeline.report import AskedPrompt, Observer, StageOutcome
from loraline.client.pipeline.spec import AskSpec
from loraline.client.resources.inference import Answer

AT_ONCE = 4
"""Questions asked at the same time."""
LOOK_SECONDS = 5.0
"""How often the server is asked what it is doing while it loads."""
T = TypeVar("T")


async def serve(
    client: AsyncLoraline,
    base: trainer_pb2.BaseModel,
    adapter: artifact_pb2.ArtifactRef | None,
    alias: str,
    observer: Observer,
) -> StageOutcome:
    """Serve a base model and, with an adapter, prove it and move the alias to it; what is served already stays."""
    started = time.monotonic()
    served, kept = await _serve_base(client, base, observer)
    if adapter is not None:
        served, adapter_kept = await _serve_adapter(client, adapter, alias, observer)
        kept = kept and adapter_kept
    seconds = time.monotonic() - started
    name = f"{served.name}" if adapter is None else f"{adapter.name}@{alias}"
    how = "already done" if kept else ""
    return StageOutcome("serve", how, seconds=0.0 if kept else seconds, served=served, detail=name)


async def _serve_base(
    client: AsyncLoraline, base: trainer_pb2.BaseModel, observer: Observer
) -> tuple[inference_pb2.ServedModel, bool]:
    now = (await client.inference.capabilities()).base  # empty while no model is loaded
    if base.artifact.digest and now.artifact.digest == base.artifact.digest:
        return now, True
    what = f"loading {describe_base(base)} into the engine"
    observer.remark("serve", what)
    return await watched(client.inference.load_model(base), what, client, observer), False


async def _serve_adapter(
    client: AsyncLoraline, adapter: artifact_pb2.ArtifactRef, alias: str, observer: Observer
) -> tuple[inference_pb2.ServedModel, bool]:
    for model in await client.inference.models():
        if model.artifact.digest == adapter.digest and alias in model.aliases and model.HasField("proof"):
            return model, True
    what = f"loading {adapter.name}:v{adapter.version} and proving that it is what answers"
    observer.remark("serve", what)
    return (await watched(client.inference.set_alias(adapter, alias), what, client, observer)).model, False


async def watched(
    call: Awaitable[T], what: str, client: AsyncLoraline, observer: Observer, look_seconds: float = LOOK_SECONDS
) -> T:
    """Await a call of minutes; tell what the server says it is doing when that changes, else now and then the time."""
    started, told, tell_after = time.monotonic(), "", 2 * look_seconds
    work = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({work}, timeout=look_seconds))[0]:
            elapsed = time.monotonic() - started
            phase = await _phase(client)
            if phase != told or elapsed >= tell_after:
                observer.remark("serve", f"{phase or f'still {what}'} ({elapsed:.0f} s)")
                told, tell_after = phase, elapsed * 2
        return await work
    finally:
        work.cancel()


async def _phase(client: AsyncLoraline) -> str:
    try:
        return (await client.inference.capabilities()).not_ready_because.rstrip(".")
    except LoralineApiError:
        return ""  # the call itself will say what is wrong


async def ask(client: AsyncLoraline, spec: AskSpec, who: dict[str, str]) -> list[AskedPrompt]:
    """Ask every question of each model; `who` maps a heading to a served name (empty for the base)."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: str, model: str) -> Answer:
        turns = [{"role": "user", "content": prompt}]
        if spec.system_prompt:
            turns.insert(0, {"role": "system", "content": spec.system_prompt})
        async with limit:
            return await client.inference.answer(model, turns, sampling=spec.sampling)

    async def all_of(group: str, prompt: str) -> AskedPrompt:
        answers = await asyncio.gather(*(one(prompt, model) for model in who.values()))
        return AskedPrompt(group, prompt, dict(zip(who, answers, strict=True)))

    questions = [(group, prompt) for group, prompts in spec.groups.items() for prompt in prompts]
    return list(await asyncio.gather(*(all_of(group, prompt) for group, prompt in questions)))
