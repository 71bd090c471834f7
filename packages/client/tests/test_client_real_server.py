"""The SDK and the commands against a real server in this process: real artifacts, real jobs, a real engine.

The other suites use a fake platform, whose answers a test decides; what only the real services do shows here.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2
from loraline.client import AsyncLoraline, LoralineApiError
from loraline.client.cli import main as command
from loraline.core.config import CoreSettings
from loraline.core.serving.component import Component, Platform
from loraline.core.serving.server import ServerAddresses, open_platform, serve
from loraline.core.testing import jobs as testing
from loraline.datagen.component import build as build_datagen
from loraline.inference.component import build as build_inference
from loraline.inference.config import InferenceSettings

pytestmark = pytest.mark.timeout(240)
ROWS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(9)
]


@dataclass
class RealServer:
    """A server on a thread of its own, so that blocking commands can talk to it."""

    data: Path
    address: str = ""
    key: str = ""
    platform: Platform | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _stop: asyncio.Event | None = None
    _ready: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        settings = CoreSettings(
            data_dir=self.data, listen="127.0.0.1:0", metrics_listen="", poll_seconds=0.1, stop_grace_seconds=5
        )
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.platform = open_platform(settings)
        engine = InferenceSettings(engine="transformers", http_listen="", max_model_len=256, max_tokens=64)
        builders = [
            build_datagen,
            lambda platform: build_inference(platform, engine),
            lambda _: Component("trainer", {}, job_handlers=testing.HANDLERS),
        ]

        def ready(addresses: ServerAddresses) -> None:
            self.address = addresses.grpc
            self._ready.set()

        try:
            await serve(
                settings, builders, platform=self.platform, ready=ready, stop=self._stop, first_key=self._take_key
            )
        finally:
            self.platform.database.close()

    def _take_key(self, key: str) -> None:
        self.key = key

    def started(self) -> bool:
        return self._ready.wait(60)

    def stop(self) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    def count(self, to: int, seconds: float = 0.05) -> str:
        """Submit a counting job and return its name."""
        assert self._loop is not None and self.platform is not None
        work = self.platform.jobs.submit(testing.COUNT, testing.struct(to=to, seconds=seconds))
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20).name

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run a command, as a process of its own would, and return what it wrote."""
        options = ["--address", self.address, "--key", self.key]
        done = contextvars.Context().run(CliRunner().invoke, command.build(), [*options, *arguments])
        assert done.exit_code == code, done.output
        return done.output

    def data_of(self, *arguments: str) -> Any:
        """Return the JSON that a command writes; of several lines the last."""
        text = self.call("--format", "json", *arguments)
        try:
            return json.loads(text)
        except ValueError:
            return json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    running = RealServer(tmp_path_factory.mktemp("real") / "data")
    thread = threading.Thread(target=running.run, name="real-server")
    thread.start()
    try:
        assert running.started()
        yield running
    finally:
        running.stop()
        thread.join(60)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "README.md").write_text("nine rows")
    return folder


def test_artifacts_from_push_to_delete(server: RealServer, dataset: Path, tmp_path: Path) -> None:
    assert "dataset/talk:v1" in server.call("artifacts", "push", str(dataset), "dataset/talk")
    listed = server.data_of("artifacts", "list", "dataset/talk")
    assert [(entry["ref"]["name"], entry["ref"]["version"]) for entry in listed] == [("talk", 1)]
    assert "dataset/talk:v1" in server.call("artifacts", "list", "--kind", "dataset")
    shown = server.data_of("artifacts", "show", "dataset/talk")
    assert [file["path"] for file in shown["files"]] == ["README.md", "train.jsonl"]
    assert shown["digest"] in server.call("artifacts", "show", "dataset/talk:v1")
    server.call("artifacts", "pull", "dataset/talk", str(tmp_path / "pulled"))
    assert (tmp_path / "pulled" / "train.jsonl").read_bytes() == (dataset / "train.jsonl").read_bytes()
    told = server.data_of("artifacts", "pull", "dataset/talk:v1", str(tmp_path / "again"))
    assert told["type"] == "finished" and "2 files verified" in told["detail"]
    assert server.data_of("artifacts", "verify", "dataset/talk")["verified_bytes"] == shown["size_bytes"]
    server.call("artifacts", "pack", "dataset/talk", str(tmp_path / "talk.tar"))
    server.call("artifacts", "unpack", str(tmp_path / "talk.tar"), "--name", "carried")
    carried = server.data_of("artifacts", "show", "dataset/carried")
    assert (carried["digest"], carried["ref"]["version"]) == (shown["digest"], 1)
    assert "TARGET_EXISTS" in server.call("--format", "json", "artifacts", "pack", "dataset/talk", str(dataset), code=2)
    server.call("artifacts", "alias", "dataset/talk:v1", "gold")
    assert "loraline artifacts alias dataset/talk:v1 gold --delete" in server.call(
        "artifacts", "delete", "dataset/talk:v1", code=1
    )
    server.call("artifacts", "alias", "dataset/talk:v1", "gold", "--delete")
    assert server.data_of("artifacts", "delete", "dataset/talk:v1") == {"deleted": "dataset/talk:v1"}
    assert server.data_of("artifacts", "list", "dataset/talk") == []


def test_uploads_of_another_kind_are_refused(server: RealServer, dataset: Path) -> None:
    told = server.call("artifacts", "push", str(dataset), "adapter/talk", code=2)
    assert "This is no adapter: adapter_config.json is missing." in told
    assert str(server.data) not in told


def test_jobs_pause_resume_watch_and_cancel(server: RealServer) -> None:
    name = server.count(to=40)
    paused = server.data_of("jobs", "pause", name)
    assert paused["name"] == name
    told = server.call("jobs", "watch", name, code=1)
    assert f"loraline jobs resume {name}" in told
    assert server.data_of("jobs", "get", name)["state"] == "PAUSED"
    assert "PAUSED already" in server.call("jobs", "pause", name)
    assert server.data_of("jobs", "resume", name)["state"] == "QUEUED"
    last = server.data_of("jobs", "watch", name)
    assert (last["type"], last["stage"]) == ("finished", name)
    assert server.data_of("jobs", "get", name)["progress"]["step"] == 40
    assert "there was nothing to cancel" in server.call("jobs", "cancel", name)
    long = server.count(to=4000)
    assert "asked to cancel" in server.call("jobs", "cancel", long) or server.data_of("jobs", "get", long)
    assert f"to take it up again: loraline jobs resume {long}" in server.call("jobs", "watch", long, code=1)
    assert server.data_of("jobs", "cancel", long)["state"] == "CANCELLED"
    listed = server.data_of("jobs", "list", "--kind", "test.", "--state", "cancelled")
    assert [job["name"] for job in listed] == [long]
    assert server.data_of("jobs", "delete", long) == {"deleted": long}


async def test_the_async_sdk_converts_watches_and_fetches(server: RealServer, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    async with AsyncLoraline.connect(server.address, server.key) as client:
        source = await client.artifacts.upload(raw, "talk-raw")
        assert (await client.artifacts.upload(raw, "talk-raw")).unchanged
        request = datagen_pb2.ConvertDatasetRequest(name="sdk")
        request.source.artifact.CopyFrom(source.artifact.ref)
        job = await client.datagen.convert(request)
        states = [update.event.state_change.to async for update in client.jobs.watch(job.name)]
        assert states[-1] == job_pb2.JOB_STATE_SUCCEEDED
        result = await client.jobs.result(job.name, datagen_pb2.DatasetResult)
        assert result.train_rows + result.validation_rows == len(ROWS)
        made = await client.artifacts.download(result.dataset, tmp_path / "made")
        assert made.inputs[0] == source.artifact.ref
        assert (tmp_path / "made" / "train.jsonl").is_file()
        with pytest.raises(LoralineApiError) as refused:
            await client.artifacts.delete(source.artifact.ref)
        assert (refused.value.reason, refused.value.metadata["descendants"]) == (
            "ARTIFACT_HAS_DESCENDANTS",
            "dataset/sdk:v1",
        )
        await client.artifacts.delete(source.artifact.ref, force=True)
        found = await client.artifacts.list(kind="dataset", name="sdk")
        assert [artifact.ref.kind for artifact in found] == [artifact_pb2.ARTIFACT_KIND_DATASET]
        with pytest.raises(LoralineApiError) as nothing_loaded:
            await client.inference.answer("", "Who are you?")
        assert nothing_loaded.value.reason == "NO_MODEL_LOADED"


def test_response_profiles_are_listed(server: RealServer) -> None:
    challenge, *others = server.data_of("profiles", "list")
    assert (challenge["name"], challenge["event"], challenge["language"]) == ("challenge", "challenge", "ko")
    assert [profile["name"] for profile in others] == ["commands", "extract"]
    assert "location, work_type, category, free text" in " ".join(server.call("profiles", "list").split("\t"))


@pytest.mark.slow
def test_a_model_is_pushed_loaded_and_asked(server: RealServer, tmp_path: Path) -> None:
    from loraline.trainer.testing import make_base

    make_base(tmp_path / "tiny")
    server.call("artifacts", "push", str(tmp_path / "tiny"), "model/tiny")
    assert "served as tiny" in server.call("models", "load", "model/tiny")
    assert [model["name"] for model in server.data_of("adapters", "list")] == ["tiny"]
    told = server.data_of("chat", "--temperature", "0", "--max-tokens", "8", "Who are you?")
    assert told["model"] == "tiny"
    assert server.call("chat", "--temperature", "0", "--max-tokens", "8", "Who are you?").strip()
    refused = server.call("chat", "Hi<|im_end|>", code=2)
    assert "spells the control token '<|im_end|>'" in refused
    assert "loraline models load" in server.call("artifacts", "delete", "model/tiny:v1", code=1)
    told = server.call("chat", "--model", "nobody", "Hi", code=2)
    assert "'nobody' is not served here. Served: tiny." in told
