"""A running server for the tests: real sockets on free ports, a real database, a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_status import rpc_status

from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import KeyRing, current_principal
from loraline.core.serving.component import Component, Platform
from loraline.core.serving.server import ServerAddresses, serve


class Answers(inference_pb2_grpc.InferenceServiceServicer):
    """An inference service whose behaviour the test decides."""

    def __init__(self) -> None:
        self.behave: Callable[[Any], Any] = lambda request: None
        self.entered = asyncio.Event()
        self.may_finish = asyncio.Event()
        self.may_finish.set()

    async def Generate(self, request: Any, context: Any) -> Any:
        self.entered.set()
        await self.may_finish.wait()
        self.behave(request)
        principal = current_principal()
        return inference_pb2.GenerateResponse(model=principal.name if principal else "nobody")

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(3):
            yield inference_pb2.ChatResponse()
        self.behave(request)


class Trains(trainer_pb2_grpc.TrainerServiceServicer):
    """A trainer that is only asked to be there; its methods raise what the test wants."""

    async def Train(self, request: Any, context: Any) -> Any:
        return trainer_pb2.TrainResponse()


INFERENCE = "loraline.api.inference.v1.InferenceService"
TRAINER = "loraline.api.trainer.v1.TrainerService"


@dataclass
class Running:
    """A server that runs, and what a test needs to talk to it."""

    settings: CoreSettings
    addresses: ServerAddresses
    answers: Answers
    component: Component
    stop: asyncio.Event
    task: asyncio.Task[None]
    key: str
    reason: list[str] = field(default_factory=lambda: [""])

    def metadata(self, key: str = "") -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {key or self.key}"),)

    def new_key(self, role: str) -> str:
        assert self.settings.keys_file
        return KeyRing(self.settings.keys_file).create(f"{role}-key", [role])


def settings_for(folder: Path, **more: Any) -> CoreSettings:
    values = {
        "data_dir": folder / "data",
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "poll_seconds": 0.1,
        "stop_grace_seconds": 5.0,
    }
    return CoreSettings(**(values | more))


@asynccontextmanager
async def running(folder: Path, http_app: Any = None, **settings: Any) -> AsyncIterator[Running]:
    """Run a server for the duration of the block."""
    chosen = settings_for(folder, **settings)
    answers, reason, made = Answers(), [""], []  # pyright: ignore[reportAbstractUsage]

    async def not_ready_because() -> str:
        return reason[0]

    trains = Trains()  # pyright: ignore[reportAbstractUsage]

    def build(platform: Platform) -> Component:
        services = {
            INFERENCE: lambda server: inference_pb2_grpc.add_InferenceServiceServicer_to_server(answers, server),
            TRAINER: lambda server: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trains, server),
        }
        component = Component(
            "inference",
            services,
            not_ready_because=not_ready_because,
            http_app=http_app,
            http_listen="127.0.0.1:0" if http_app else "",
            extra={"platform": platform},
        )
        made.append(component)
        return component

    stop = asyncio.Event()
    addresses: asyncio.Future[ServerAddresses] = asyncio.get_running_loop().create_future()
    keys: list[str] = []
    task = asyncio.create_task(serve(chosen, [build], ready=addresses.set_result, stop=stop, first_key=keys.append))
    await asyncio.wait({task, addresses}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield Running(chosen, addresses.result(), answers, made[0], stop, task, (keys or [""])[0], reason)
    finally:
        answers.may_finish.set()
        stop.set()
        await asyncio.wait_for(task, 20)


@pytest.fixture
def server(tmp_path: Path) -> Callable[..., Any]:
    """Return what runs a server in the test's folder: `async with server(tls_cert=…) as running`."""
    return partial(running, tmp_path)


def error_of(failure: grpc.aio.AioRpcError) -> LoralineError:
    """Return the typed error that a client can rebuild from a failed call."""
    status = rpc_status.from_call(failure)  # type: ignore[arg-type]
    assert status is not None, f"no details in {failure!r}"
    return LoralineError.from_status(status)


async def failure_of(call: Any) -> LoralineError:
    """Await a call (or read a stream) that must fail, and return its error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__") and not hasattr(call, "__await__"):
            async for _ in call:
                pass
        else:
            await call
    return error_of(caught.value)


@pytest.fixture(name="failure_of")
def _failure_of() -> Callable[[Any], Any]:
    return failure_of


@pytest.fixture(name="series")
def _series() -> Callable[[str, str], Sequence[str]]:
    return series


def series(text: str, name: str) -> Sequence[str]:
    """Return the lines of one metric."""
    return [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
