"""A real server in this process for the servicer's tests, and a fake provider over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from aiohttp import web

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2_grpc
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform, serve
from loraline.core.testing.fixtures import postgres  # noqa: F401 (a fixture)
from loraline.datagen.component import build

PERSONA = Path(__file__).parents[3] / "examples" / "persona" / "raw"


@pytest.fixture
def persona() -> Path:
    return PERSONA


Reply = Callable[[dict[str, Any]], web.Response | tuple[float, web.Response]]


@dataclass
class FakeProvider:
    """An OpenAI-compatible endpoint that answers what the test says and remembers what it was asked."""

    url: str = ""
    key: str = "sk-test"
    models: list[str] = field(default_factory=lambda: ["toy"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    replies: list[Any] = field(default_factory=list)
    default: Any = None

    async def models_list(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "bad key", "code": "invalid_api_key"}}, status=401)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in self.models]
        return web.json_response({"object": "list", "data": data})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "bad key", "code": "invalid_api_key"}}, status=401)
        self.requests.append(body)
        reply = self.replies.pop(0) if self.replies else self.default
        if callable(reply):
            reply = reply(body)
        if isinstance(reply, tuple):
            await asyncio.sleep(reply[0])
            reply = reply[1]
        assert isinstance(reply, web.Response)
        return reply


def completion(content: str, finish_reason: str = "stop") -> web.Response:
    return web.json_response(
        {
            "id": "c", "object": "chat.completion", "created": 0, "model": "toy",
            "choices": [
                {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
        }
    )  # fmt: skip


def items(start: int, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {n}", "response": f"answer {n}"} for n in range(start, start + count)]


@pytest.fixture
def fresh_items() -> Callable[[dict[str, Any]], web.Response]:
    """Answers with as many new items as the request asks for."""
    made = iter(range(10**9))

    def reply(body: dict[str, Any]) -> web.Response:
        wanted = int(body["messages"][-1]["content"].rsplit("Write ", 1)[1].split()[0])
        return completion(json.dumps({"items": [items(next(made), 1)[0] for _ in range(wanted)]}))

    return reply


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch, fresh_items: Any) -> AsyncIterator[FakeProvider]:
    fake = FakeProvider(default=fresh_items)
    app = web.Application()
    app.router.add_get("/v1/models", fake.models_list)
    app.router.add_post("/v1/chat/completions", fake.chat)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    monkeypatch.setenv("LLM_BASE_URL", fake.url)
    monkeypatch.setenv("LLM_API_KEY", fake.key)
    monkeypatch.setenv("LLM_MODEL", "toy")
    monkeypatch.delenv("LLM_API_KEY_FILE", raising=False)
    monkeypatch.setenv("LORALINE_DATAGEN_LLM_BACKOFF_SECONDS", "0.05")
    yield fake
    await runner.cleanup()


@dataclass
class Running:
    """A served datagen with what tests need of it."""

    datagen: Any
    jobs: Any
    platform: Platform
    root: Path

    @property
    def library(self) -> ArtifactLibrary:
        return self.platform.library

    async def finished(self, name: str, seconds: float = 60) -> job_pb2.Job:
        """Wait until the job has ended or is paused."""
        ended = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
        async with asyncio.timeout(seconds):
            while True:
                job = (await self.jobs.GetJob(job_pb2.GetJobRequest(name=name))).job
                if job.state in (*ended, job_pb2.JOB_STATE_PAUSED):
                    return job
                await asyncio.sleep(0.1)

    def upload(self, folder: Path, name: str = "raw") -> artifact_pb2.ArtifactRef:
        return self.library.publish(artifact_pb2.ARTIFACT_KIND_SOURCE, name, folder).ref

    def rows(self, ref: artifact_pb2.ArtifactRef, file: str = "train.jsonl") -> list[dict[str, Any]]:
        text = (self.library.fetch(ref) / file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@asynccontextmanager
async def serving(settings: CoreSettings, root: Path) -> AsyncIterator[Running]:
    """Serve datagen with these settings, as one machine does; at the end its jobs are handed back."""
    platform = await asyncio.to_thread(open_platform, settings)
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(settings, [build], platform=platform, ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    async with grpc.aio.insecure_channel(ready.result().grpc) as channel:
        yield Running(
            datagen_pb2_grpc.DatagenServiceStub(channel), job_pb2_grpc.JobServiceStub(channel), platform, root
        )
    stop.set()
    await task
    platform.database.close()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    settings = CoreSettings(
        data_dir=tmp_path / "data", listen="127.0.0.1:0", metrics_listen="", auth="off", poll_seconds=0.1,
        allowed_paths=[allowed, PERSONA],
    )  # fmt: skip
    async with serving(settings, allowed) as served:
        yield served


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes files into a folder and returns it."""
    folder = tmp_path / "raw"

    def write_files(**files: str | bytes) -> Path:
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        folder.mkdir(exist_ok=True)
        return folder

    yield write_files
