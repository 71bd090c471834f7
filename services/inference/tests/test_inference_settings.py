"""Settings of the engine by environment: each by its two prefixes and by the plain name, and what reaches vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraline.inference.config import InferenceSettings
from loraline.inference.engines.vllm_process import engine_arguments

# Setting, another name that vLLM's users know, a value, and the argument of vLLM's that it becomes.
ENGINE = [
    ("gpu_memory_utilization", "", "0.55", ("gpu_memory_utilization", 0.55)),
    ("tensor_parallel_size", "", "2", ("tensor_parallel_size", 2)),
    ("pipeline_parallel_size", "", "2", ("pipeline_parallel_size", 2)),
    ("distributed_executor_backend", "", "ray", ("distributed_executor_backend", "ray")),
    ("dtype", "", "bfloat16", ("dtype", "bfloat16")),
    ("quantization", "", "fp8", ("quantization", "fp8")),
    ("kv_cache_dtype", "", "fp8", ("kv_cache_dtype", "fp8")),
    ("max_model_len", "", "321", ("max_model_len", 321)),
    ("max_num_batched_tokens", "", "777", ("max_num_batched_tokens", 777)),
    ("max_concurrent_requests", "max_num_seqs", "33", ("max_num_seqs", 33)),
    ("max_lora_rank", "", "32", ("max_lora_rank", 32)),
    ("max_batch_adapters", "max_loras", "3", ("max_loras", 3)),
    ("max_loaded_adapters", "max_cpu_loras", "6", ("max_cpu_loras", 7)),
    ("enable_prefix_caching", "", "false", ("enable_prefix_caching", False)),
    ("enforce_eager", "", "true", ("enforce_eager", True)),
    ("cpu_offload_gb", "", "1.5", ("cpu_offload_gb", 1.5)),
]


@pytest.mark.parametrize(("name", "other", "value", "argument"), ENGINE, ids=[row[0] for row in ENGINE])
@pytest.mark.parametrize("prefix", ["LORALINE_INFERENCE_", "LORALINE_", ""])
def test_every_engine_setting_comes_from_the_environment(
    prefix: str, name: str, other: str, value: str, argument: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for one in filter(None, (name, other)):
        with monkeypatch.context() as patch:
            patch.setenv(prefix + one.upper(), value)
            options = InferenceSettings().engine_options()
            assert engine_arguments(tmp_path, options, on_cpu=False)[argument[0]] == argument[1]
    assert (
        engine_arguments(tmp_path, InferenceSettings().engine_options(), on_cpu=False).get(argument[0]) != argument[1]
    )


@pytest.mark.slow
def test_what_every_setting_becomes_is_an_argument_of_vllm() -> None:
    from dataclasses import fields

    arguments = pytest.importorskip("vllm.engine.arg_utils").AsyncEngineArgs
    known = {field.name for field in fields(arguments)}
    assert {argument for *_, (argument, _) in ENGINE} <= known


def test_the_nearer_name_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, name in (("0.4", ""), ("0.5", "LORALINE_"), ("0.6", "LORALINE_INFERENCE_")):
        monkeypatch.setenv(f"{name}GPU_MEMORY_UTILIZATION", value)
        assert InferenceSettings().gpu_memory_utilization == float(value)
    assert InferenceSettings(gpu_memory_utilization=0.7).gpu_memory_utilization == 0.7


def test_further_arguments_win_and_what_is_unset_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert InferenceSettings().engine_options().extra == {}
    monkeypatch.setenv("QUANTIZATION", "fp8")
    monkeypatch.setenv("LORALINE_INFERENCE_ENGINE_ARGUMENTS", '{"quantization": "awq", "seed": 7}')
    assert InferenceSettings().engine_options().extra == {"quantization": "awq", "seed": 7}
    monkeypatch.setenv("TOOL_CALL_PARSER", "hermes")
    monkeypatch.setenv("LORALINE_KV_CACHE_GIB", "2.5")
    assert (InferenceSettings().tool_parser, InferenceSettings().engine_options().kv_cache_gib) == ("hermes", 2.5)
