"""A fake platform in this process (for the async client) and one in its own (for blocking clients and commands)."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from loraline.client import AsyncLoraline

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def fake_platform() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loraline_fake_platform", HERE / "fake_platform.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    for name in ("ADDRESS", "API_KEY", "TLS", "TLS_CA", "DEBUG", "TRAINER_ADDRESS"):
        monkeypatch.delenv(f"LORALINE_{name}", raising=False)
    monkeypatch.setenv("LORALINE_DATA_DIR", str(tmp_path / "loraline-data"))


@pytest.fixture
async def platform(fake_platform):
    return fake_platform.Platform()


@pytest.fixture
async def client(fake_platform, platform):
    server, address = await fake_platform.start(platform)
    async with AsyncLoraline.connect(address) as connected:
        yield connected
    for task in platform.tasks:
        task.cancel()
    await server.stop(None)


@pytest.fixture
def address():
    """The address of a fresh platform in another process."""
    server = subprocess.Popen([sys.executable, str(HERE / "fake_platform.py")], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    yield server.stdout.readline().strip()
    server.kill()
    server.wait()
    server.stdout.close()


@pytest.fixture
def start_here(fake_platform) -> Iterator[Callable[[], str]]:
    """Starts a platform in this process, once a test has set its answers; a command may block this thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make():
        return await fake_platform.start(fake_platform.Platform())

    servers = []

    def start() -> str:
        server, where = asyncio.run_coroutine_threadsafe(make(), loop).result(30)
        servers.append(server)
        return where

    yield start
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


PIPELINE = """
name: mareva
base_model: {tiny: {tokenizer_texts: raw}}
sources: {raw: raw}
datasets:
  dialogue:
    convert: {source: raw, subpath: dialogue, character: Mareva}
    drop_duplicates: true
  settings: {convert: {source: raw, subpath: settings, character: Mareva}}
train:
  datasets: {dialogue: 1, settings: 5}
  training_params: {epochs: 3, lr: 2e-4, lora_r: 16}
merge: {dtype: fp32}
serve: {alias: production}
ask: {prompts: prompts.yaml, temperature: 0}
"""


@pytest.fixture
def pipeline(tmp_path) -> Path:
    (tmp_path / "raw" / "dialogue").mkdir(parents=True)
    (tmp_path / "raw" / "dialogue" / "talk.json").write_text("[]")
    (tmp_path / "raw" / ".hidden").write_text("no")
    (tmp_path / "prompts.yaml").write_text('seen: [hello]\nunseen: ["how are you?"]\nmarkers: [little sailor]\n')
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE)
    return file
