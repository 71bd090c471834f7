"""`loraline doctor`: what it prints, what it ends with, and what it makes of a log and of a running server."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from loraline.core.preflight.command import register
from loraline.core.preflight.model_folder import check_model_folder
from loraline.core.serving.addresses import free_port
from loraline.core.serving.http import MetricsServer

LOG = (
    "INFO 11-23 00:01:02 starting, gpu_memory_utilization=0.9\n"
    "ERROR 11-23 00:01:20 ValueError: Free memory on device cuda:0 (13.4/23.5 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 21.1 GiB).\n"
    "ERROR Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -4}\n"
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: free ports, an empty data folder, and no hub that anyone would ask."""
    for name, value in {
        "LORALINE_DATA_DIR": str(tmp_path / "data"),
        "LORALINE_LISTEN": f"127.0.0.1:{free_port()}",
        "LORALINE_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
        "LORALINE_INFERENCE_HTTP_LISTEN": f"127.0.0.1:{free_port()}",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def doctor(*arguments: str, given: str = "") -> tuple[int, str]:
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, list(arguments), input=given)
    return done.exit_code, done.output


def findings(*arguments: str) -> dict[str, dict[str, Any]]:
    _, output = doctor(*arguments, "--format", "json")
    return {found["check"]: found for found in json.loads(output)}


def test_a_taken_port_is_explained_in_the_language_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings()["port gRPC"]["level"] == "ok"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("LORALINE_LISTEN", f"127.0.0.1:{taken.getsockname()[1]}")
        code, text = doctor("--language", "ko")
        assert code == 1
        assert "FAILED   port gRPC: 127.0.0.1:" in text
        assert "포트" in text
        found = findings()["port gRPC"]
        assert found["reason"] == "PORT_TAKEN"
        assert set(found["explained"]) == {"en", "zh", "ko"}
    assert doctor("--language", "fr")[0] == 2


def test_a_model_folder_is_looked_into(place: Path) -> None:
    (place / "model").mkdir()
    code, text = doctor("--model", str(place / "model"))
    assert code == 1
    assert "config.json" in text


def test_every_part_of_the_machine_is_looked_at_by_core_and_by_the_stages() -> None:
    """What inference checks comes by its entry point, as in a whole installation."""
    pytest.importorskip("loraline.inference")
    code, output = doctor("--format", "json")
    found = {one["check"]: one for one in json.loads(output)}
    of_core = {"port gRPC", "port metrics", "disk", "package manager", "hub", "server"}
    assert of_core | {"port HTTP", "C compiler", "GPU"} <= set(found)
    assert all(one["level"] in {"ok", "warning", "failed"} and one["said"] for one in found.values())
    assert "model folder" not in found  # none was given
    assert code == int(any(one["level"] == "failed" for one in found.values()))


def model_of(folder: Path, heads: int) -> Path:
    """Write a model of one layer of attention, 16 wide, whose config says how many heads of 4 there are."""
    folder.mkdir()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": heads, **sizes}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "eos_token_id": 6}))
    layer = {f"self_attn.{name}_proj": [16, 16] for name in "qkvo"}
    layer |= {"mlp.gate_proj": [32, 16], "mlp.up_proj": [32, 16], "mlp.down_proj": [16, 32]}
    layer |= {"input_layernorm": [16], "post_attention_layernorm": [16]}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": [8, 16], "model.norm.weight": [16]}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(end))
    vocabulary = {letter: number for number, letter in enumerate("abcdef")} | {"</s>": 6}
    end_token = {"id": 6, "content": "</s>", "special": True, "normalized": False}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": [end_token]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def test_what_only_the_mergers_check_sees_of_a_model_is_found(place: Path) -> None:
    pytest.importorskip("loraline.merger")
    good, bad = model_of(place / "good", 4), model_of(place / "bad", 3)
    for folder in (good, bad):  # to core's own check both are whole
        assert [finding.level for finding in check_model_folder(folder)] == ["ok"]
    code, text = doctor("--model", str(good))
    assert code == 0, text
    assert f"{good} is whole" in text
    code, text = doctor("--model", str(bad))
    assert code == 1
    assert "FAILED   model folder: " in text
    assert "num_attention_heads 3 × head_dim 4 = 12, but" in text


def test_a_log_is_explained(place: Path) -> None:
    (place / "server.log").write_text(LOG)
    code, text = doctor("--log", str(place / "server.log"))
    assert code == 1
    assert "Not enough free GPU memory" in text
    assert "illegal instruction" in text
    assert doctor("--log", "-", given="all is well\n") == (0, "ok       log: nothing in it is a known failure\n")


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The health page of a server, on a thread of its own; the test changes its reasons."""
    reasons = {"database": "", "inference": ""}
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("LORALINE_METRICS_LISTEN", f"127.0.0.1:{listener.getsockname()[1]}")
    loop = asyncio.new_event_loop()
    health: Any = SimpleNamespace(reasons=reasons)
    server = MetricsServer(CollectorRegistry(), health)
    loop.run_until_complete(server.start(listener))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield reasons
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_server_here_is_asked_how_it_is(running: dict[str, str]) -> None:
    code, text = doctor()
    assert code == 0, text
    assert "server: inference: ready" in text
    assert "is taken" not in text  # its own ports are no problem
    running["inference"] = "model/x could not be loaded: RuntimeError: Failed to find C compiler."
    code, text = doctor("--language", "zh")
    assert code == 1
    assert "编译器" in text
    running["inference"] = "Loading model/x."
    assert findings()["server: inference"]["level"] == "warning"
