"""A server with TLS and keys, as docs/grpc.md sets it up, and the page's programs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraline.core.serving.addresses import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "grpc.md"
START_SECONDS = 90


def blocks(heading: str) -> list[str]:
    """Return the page's code blocks that open with these words, such as `python run`."""
    found = re.findall(rf"^```{re.escape(heading)}\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"docs/grpc.md has no block ```{heading}"
    return found


@dataclass
class TlsServer:
    """A server that runs, and the environment of those who call it."""

    environment: dict[str, str]
    folder: Path

    def run(self, *command: str | Path, cwd: Path, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program that talks to the server."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip


def _wait_until_it_listens(server: subprocess.Popen[bytes], data: Path, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while b"listens on" not in log.read_bytes() or not (data / "client.key").exists():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@contextmanager
def tls_server(folder: Path, *stages: str, **settings: str) -> Iterator[TlsServer]:
    """Run `loraline up` with the certificates that the page makes."""
    subprocess.run(["bash", "-eu", "-c", blocks("sh tls")[0]], cwd=folder, check=True, capture_output=True)
    address, data, log = f"127.0.0.1:{free_port()}", folder / "data", folder / "server.log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LORALINE_", "OTEL_"))}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    own = {
        "LORALINE_DATA_DIR": str(data),
        "LORALINE_LISTEN": address,
        "LORALINE_METRICS_LISTEN": "",
        "LORALINE_INFERENCE_HTTP_LISTEN": f"127.0.0.1:{free_port()}",
        "LORALINE_TLS_CERT": str(folder / "server.pem"),
        "LORALINE_TLS_KEY": str(folder / "server.key"),
        **settings,
    }
    command = [sys.executable, "-m", "loraline.client.cli.main", "up"]
    with log.open("wb") as output:
        options = [word for stage in stages for word in ("--stage", stage)]
        server = subprocess.Popen([*command, *options], env={**clean, **own}, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_listens(server, data, log)
        caller = {
            **clean,
            "PATH": tools,
            "LORALINE_DATA_DIR": str(folder / "client"),
            "LORALINE_ADDRESS": address,
            "LORALINE_API_KEY": (data / "client.key").read_text().strip(),
            "LORALINE_TLS_CA": str(folder / "ca.pem"),
        }
        yield TlsServer(caller, folder)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Run datagen behind TLS and keys."""
    with tls_server(tmp_path_factory.mktemp("tls"), "datagen") as running:
        yield running


@pytest.fixture(scope="module")
def talking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Run inference with a toy model behind TLS and keys."""
    from loraline.trainer.testing import make_base

    folder = tmp_path_factory.mktemp("talking")
    model = make_base(folder / "toy")
    settings = {
        "LORALINE_ALLOWED_PATHS": f'["{folder}"]',
        "LORALINE_INFERENCE_ENGINE": "transformers",
        "LORALINE_INFERENCE_MAX_MODEL_LEN": "256",
    }
    with tls_server(folder, "inference", **settings) as running:
        done = running.run(sys.executable, "-m", "loraline.client.cli.main", "models", "load", model, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        yield running


@pytest.fixture(scope="session")
def page_blocks() -> Callable[[str], list[str]]:
    """Return what finds the page's code blocks."""
    return blocks
