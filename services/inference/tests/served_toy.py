"""The whole stage behind a real server, with the toy model on a real engine: what several test modules start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import status_pb2

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.api.inference.v1 import inference_pb2_grpc
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import KeyRing
from loraline.core.serving.component import Component, Platform
from loraline.core.serving.opening import open_platform
from loraline.core.serving.server import serve
from loraline.inference.component import build
from loraline.inference.config import InferenceSettings
from loraline.inference.engines.choice import EngineChoice

ADAPTER, MODEL = artifact_pb2.ARTIFACT_KIND_ADAPTER, artifact_pb2.ARTIFACT_KIND_MODEL


@dataclass
class Served:
    """A running server and how to call it; `key` is the operator's."""

    stub: Any  # its type stub knows only the synchronous client
    channel: grpc.aio.Channel
    http: str
    """http://host:port"""
    key: str
    platform: Platform
    component: Component
    keys: dict[str, str] = field(default_factory=dict)

    def new_key(self, name: str, role: str = "chat", **limits: Any) -> str:
        """Make another key and return it."""
        path = self.platform.settings.keys_file
        assert path is not None
        self.keys[name] = KeyRing(path).create(name, [role], **limits)
        return self.keys[name]

    def metadata(self, key: str = "") -> list[tuple[str, str]]:
        """Return the metadata of a call with a key; the operator's when none is given."""
        return [("authorization", f"Bearer {key or self.key}")]

    async def call(self, method: str, request: Any, key: str = "", timeout: float = 120) -> Any:
        """Call a method."""
        return await getattr(self.stub, method)(request, metadata=self.metadata(key), timeout=timeout)

    async def chat(self, request: pb.ChatRequest, key: str = "") -> list[pb.ChatResponse]:
        """Return an answer's pieces."""
        return [piece async for piece in self.stub.Chat(request, metadata=self.metadata(key), timeout=120)]

    def metric(self, name: str, **labels: str) -> float:
        """Return a figure of the server's registry; 0 when there is none."""
        return self.platform.registry.get_sample_value(name, labels) or 0.0


async def refused(call: Any) -> LoralineError:
    """Return the typed error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing = dict(caught.value.trailing_metadata() or ())  # type: ignore[call-overload]
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])  # type: ignore[arg-type]
    return LoralineError.from_status(status)


def ask(text: str = "Tell me about the storm", model: str = "", session: str = "", **sampling: Any) -> pb.ChatRequest:
    """Return a greedy question of few tokens."""
    return pb.ChatRequest(
        model=model,
        session=session,
        messages=[pb.Message(role="user", content=text)],
        sampling=pb.SamplingParameters(**{"max_tokens": 24, "temperature": 0.0, **sampling}),
    )


@asynccontextmanager
async def served_toy(
    engine: str, model: Path, data_dir: Path, chosen: EngineChoice | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """Serve the toy model; keys are on. `chosen` is put in the engine's place: one that only counts."""
    core = CoreSettings(data_dir=data_dir, listen="127.0.0.1:0", metrics_listen="", stop_grace_seconds=5)
    platform = open_platform(core)
    given = {"max_model_len": 512, "max_tokens": 400, "max_n": 4, "max_lora_rank": 16, "alias_cache_seconds": 0}
    inference = InferenceSettings(engine=engine, http_listen="127.0.0.1:0", **{**given, **settings})  # type: ignore[arg-type]
    component = build(platform, inference)
    if chosen is not None:
        component.extra["host"]._choose = lambda _: chosen
    ready, stop, keys = asyncio.get_running_loop().create_future(), asyncio.Event(), []
    running = asyncio.create_task(
        serve(core, [lambda _: component], platform=platform, ready=ready.set_result, stop=stop, first_key=keys.append)
    )
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    try:
        addresses = ready.result()
        async with grpc.aio.insecure_channel(addresses.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            served = Served(stub, channel, f"http://{addresses.http['inference']}", keys[0], platform, component)
            base = platform.library.publish(MODEL, "toy", model).ref
            await served.call("LoadModel", pb.LoadModelRequest(model=BaseModel(artifact=base)), timeout=800)
            yield served
    finally:
        stop.set()
        await running
        platform.database.close()
