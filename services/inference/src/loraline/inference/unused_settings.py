"""Settings that a person gave and the running engine does not follow: what it cannot use, and what it changed."""

from __future__ import annotations

import os
from collections.abc import Iterator

from loraline.inference.config import InferenceSettings
from loraline.inference.engines.port import EngineFacts

_ONLY_VLLM = (
    *("max_batch_adapters", "kv_cache_gib", "gpu_memory_utilization", "tensor_parallel_size"),
    *("pipeline_parallel_size", "distributed_executor_backend", "quantization", "kv_cache_dtype"),
    *("max_num_batched_tokens", "enable_prefix_caching", "cpu_offload_gb", "enforce_eager", "coalesce_seconds"),
    "engine_arguments",
)
_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def not_followed(settings: InferenceSettings, facts: EngineFacts) -> dict[str, str]:
    """Return setting -> what became of it, for those that were given; the defaults' values need no word."""
    fields = type(settings).model_fields
    given = {name for name in settings.model_fields_set if getattr(settings, name) != fields[name].default}
    told = {**dict(_without_effect(settings, facts)), **dict(_changed(settings, facts))}
    return {name: why for name, why in told.items() if name in given}


def _without_effect(settings: InferenceSettings, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    if facts.engine == "transformers":
        for name in _ONLY_VLLM:
            yield name, "has no effect: the transformers engine runs here, and only vLLM knows it"
    elif facts.device == "cpu":
        yield "gpu_memory_utilization", "has no effect on a CPU: KV_CACHE_GIB sets the cache's size there"
        yield "tensor_parallel_size", "has no effect on a CPU: the engine is one process there"
        if os.environ.get(_KV_SPACE):
            yield "kv_cache_gib", f"has no effect: {_KV_SPACE} is set and is stronger"
    else:
        yield "kv_cache_gib", "has no effect on a GPU: GPU_MEMORY_UTILIZATION sets the cache's size there"


def _changed(settings: InferenceSettings, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    if facts.engine == "vllm" and settings.max_batch_adapters > settings.max_loaded_adapters:
        loaded = settings.max_loaded_adapters
        yield "max_batch_adapters", f"is lowered to {loaded}: MAX_LOADED_ADAPTERS are held at once, no more"
    for name, asked, real in (
        ("max_model_len", settings.max_model_len, facts.max_model_len),
        ("max_lora_rank", settings.max_lora_rank, facts.max_lora_rank),
        ("max_concurrent_requests", settings.max_concurrent_requests, facts.concurrency),
    ):
        if real and asked and real != asked:
            yield name, f"is {asked}; in force is {real}, which this engine and model take"
