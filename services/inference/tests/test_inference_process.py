"""The stage as a process of its own: what it leaves behind when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.api.inference.v1 import inference_pb2_grpc
from loraline.core.serving.addresses import free_port


def figures(url: str) -> dict[str, float]:
    """Return the series that a server tells Prometheus, by name, summed over their labels."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(url, timeout=30) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


@pytest.fixture
def server(toy: Any, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server with the toy model as its setting, on vLLM, its gRPC address and where its metrics are."""
    pytest.importorskip("vllm")
    metrics = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "LORALINE_DATA_DIR": str(tmp_path / "data"),
        "LORALINE_LISTEN": "127.0.0.1:0",
        "LORALINE_METRICS_LISTEN": metrics,
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
    yield process, line.split("listens on ")[1].split()[0], f"http://{metrics}/metrics"
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_tells_vllms_figures_and_leaves_no_engine_behind_when_it_is_killed(
    server: tuple[subprocess.Popen[str], str, str],
) -> None:
    process, address, metrics = server
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
    told = {name: value for name, value in figures(metrics).items() if name.startswith("vllm:")}
    # The first token at the load, the two that were asked for, and further checks of the watch.
    assert told["vllm:generation_tokens_total"] >= 3
    assert told["vllm:prompt_tokens_total"] > 0
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= set(told)
    assert told["vllm:time_to_first_token_seconds_count"] >= 1
    engines = psutil.Process(process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in engines)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(engines, timeout=20)
    assert not alive, [child.cmdline() for child in alive]
