"""The stage as a process of its own: what it leaves behind when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.api.inference.v1 import inference_pb2_grpc


@pytest.fixture
def server(toy: Any, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with the toy model as its setting, on vLLM, and its gRPC address."""
    pytest.importorskip("vllm")
    environment = {
        **os.environ,
        "LORALINE_DATA_DIR": str(tmp_path / "data"),
        "LORALINE_LISTEN": "127.0.0.1:0",
        "LORALINE_METRICS_LISTEN": "",
        "LORALINE_AUTH": "off",
        "LORALINE_INFERENCE_HTTP_LISTEN": "",
        "LORALINE_INFERENCE_ENGINE": "vllm",
        "LORALINE_INFERENCE_MODEL": str(toy.model),
        "LORALINE_INFERENCE_MAX_MODEL_LEN": "256",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "loraline.inference"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if "listens on" in line)
    yield process, line.split("listens on ")[1].split()[0]
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_server_leaves_no_engine_behind(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        deadline = time.monotonic() + 800
        while True:
            try:
                answer = stub.Generate(pb.GenerateRequest(prompt="Hello", sampling=pb.SamplingParameters(max_tokens=2)))
                break
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE, error  # type: ignore[attr-defined]
                assert time.monotonic() < deadline, error
                time.sleep(1)
    assert answer.model == "base"
    engines = psutil.Process(process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in engines)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(engines, timeout=20)
    assert not alive, [child.cmdline() for child in alive]
