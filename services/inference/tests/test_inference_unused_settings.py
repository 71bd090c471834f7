"""Settings that the engine does not follow are named in the log, once; those that it can follow reach it exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from counting_engine import TOY, CountingEngine, MakeHost
from structlog.testing import capture_logs

from loraline.inference.config import InferenceSettings
from loraline.inference.engines.port import EngineFacts
from loraline.inference.engines.vllm_process import engine_arguments
from loraline.inference.unused_settings import not_followed


def facts(engine: Any = "vllm", device: str = "cpu", **more: Any) -> EngineFacts:
    values = {"max_model_len": 512, "vocab_size": 400, "max_lora_rank": 64, "max_loaded_adapters": 8, **more}
    return EngineFacts(engine, "1", device, "float32", **values)


@pytest.mark.parametrize(("gib", "expected"), [("2.5", 2684354560), ("0.5", 536870912), ("1", 1073741824)])
def test_fractions_of_the_cache_reach_vllm(
    gib: str, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KV_CACHE_GIB", gib)
    options = InferenceSettings().engine_options()
    assert engine_arguments(tmp_path, options, on_cpu=True)["kv_cache_memory_bytes"] == expected
    assert "kv_cache_memory_bytes" not in engine_arguments(tmp_path, options, on_cpu=False)


def test_defaults_need_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_CACHE_GIB", "1")  # as compose files give it
    for engine in ("vllm", "transformers"):
        for device in ("cpu", "cuda"):
            assert not_followed(InferenceSettings(), facts(engine, device, concurrency=1)) == {}


def test_what_a_cpu_has_no_use_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_MEMORY_UTILIZATION", "0.6")
    monkeypatch.setenv("LORALINE_TENSOR_PARALLEL_SIZE", "2")
    monkeypatch.setenv("LORALINE_INFERENCE_KV_CACHE_GIB", "0.5")
    settings = InferenceSettings()
    assert set(not_followed(settings, facts())) == {"gpu_memory_utilization", "tensor_parallel_size"}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert "VLLM_CPU_KVCACHE_SPACE is set" in not_followed(settings, facts())["kv_cache_gib"]
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert set(not_followed(settings, facts(device="cuda"))) == {"kv_cache_gib"}


def test_what_was_changed_is_named_with_both_figures() -> None:
    settings = InferenceSettings(
        max_batch_adapters=16, max_loaded_adapters=8, max_lora_rank=9, max_model_len=4096, max_concurrent_requests=33
    )
    told = not_followed(settings, facts(max_lora_rank=16, concurrency=33))
    assert set(told) == {"max_batch_adapters", "max_lora_rank", "max_model_len"}
    assert "lowered to 8" in told["max_batch_adapters"]
    assert told["max_model_len"].startswith("is 4096; in force is 512")


def test_every_setting_of_vllms_is_told_where_transformers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the engine's settings the transformers engine reads five; a new one must be sorted into either kind."""
    read = {"dtype", "max_model_len", "max_lora_rank", "max_loaded_adapters", "tool_parser", "max_concurrent_requests"}
    of_engine = {name for name, field in InferenceSettings.model_fields.items() if field.validation_alias is not None}
    values = {"distributed_executor_backend": "mp", "enable_prefix_caching": "true", "enforce_eager": "true"}
    for name in of_engine:
        monkeypatch.setenv(name.upper(), values.get(name, "0.5" if name == "gpu_memory_utilization" else "3"))
    told = not_followed(InferenceSettings(), facts("transformers", max_model_len=3, max_lora_rank=3, concurrency=3))
    assert set(told) == of_engine - read


@pytest.mark.asyncio
async def test_it_is_said_once_however_often_the_engine_starts(make_host: MakeHost) -> None:
    host = make_host(gpu_memory_utilization=0.5)
    with capture_logs() as lines:
        await host.load_model(TOY)
        await host.load_model(TOY, "other")
    assert len(CountingEngine.started) == 2
    told = [line for line in lines if line["event"] == "setting_not_followed"]
    assert [(line["setting"], line["log_level"]) for line in told] == [("GPU_MEMORY_UTILIZATION", "warning")]
