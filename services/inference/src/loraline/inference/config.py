"""Settings of the inference stage, from the environment (prefix `LORALINE_INFERENCE_`) or keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from loraline.inference.engines.port import EngineOptions
from loraline.inference.sessions.record import SessionLimits


def _names(name: str, *others: str) -> AliasChoices:
    """Return where an engine's setting is read from: with either prefix, then by the plain name that vLLM gives it."""
    names = [name, *others]
    return AliasChoices(*(f"{prefix}{one}" for prefix in ("LORALINE_INFERENCE_", "LORALINE_", "") for one in names))


class InferenceSettings(BaseSettings):
    """What is served, by which engine, within which limits."""

    model_config = SettingsConfigDict(env_prefix="LORALINE_INFERENCE_", extra="ignore", populate_by_name=True)

    model: str = ""
    """Base model at start: `model/tiny:v1`, a folder, or a Hub id (`hub:org/name`); empty for the last one or none."""
    served_name: str = ""
    """Name of the base in requests; empty for the artifact's or folder's."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` takes vLLM where it is installed, else transformers, and logs which and why."""
    http_listen: str = "127.0.0.1:7680"
    """host:port of the OpenAI-compatible HTTP side; empty for none."""

    # What has _names is read with the prefix LORALINE_INFERENCE_ or LORALINE_, or by its plain name.
    dtype: str = Field(default="auto", validation_alias=_names("DTYPE"))
    """`auto`, `float32`, `bfloat16` or `float16`; auto is float32 for small models on a CPU, else the model's own."""
    max_model_len: int = Field(default=0, ge=0, validation_alias=_names("MAX_MODEL_LEN"))
    """Longest prompt and answer together, in tokens; 0 for what the model allows."""
    max_lora_rank: int = Field(default=64, ge=1, le=512, validation_alias=_names("MAX_LORA_RANK"))
    """Greatest rank of an adapter. Memory is reserved for it."""
    max_loaded_adapters: int = Field(
        default=8, ge=1, le=1024, validation_alias=_names("MAX_LOADED_ADAPTERS", "MAX_CPU_LORAS")
    )
    """Adapters in the engine at once; the least recently used one makes room."""
    max_batch_adapters: int = Field(default=4, ge=1, le=256, validation_alias=_names("MAX_BATCH_ADAPTERS", "MAX_LORAS"))
    """Adapters that one batch may mix."""
    max_concurrent_requests: int = Field(
        default=256, ge=1, validation_alias=_names("MAX_CONCURRENT_REQUESTS", "MAX_NUM_SEQS")
    )
    """Sequences generated at once; more wait."""
    max_queued_requests: int = Field(default=1024, ge=0)
    """Answers that may wait for one of these places; further requests are refused with a time to come back."""
    kv_cache_gib: float = Field(default=1.0, gt=0, validation_alias=_names("KV_CACHE_GIB"))
    """KV cache on a CPU, in GiB, such as 0.5 (VLLM_CPU_KVCACHE_SPACE, when set, is stronger)."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, validation_alias=_names("GPU_MEMORY_UTILIZATION"))
    """Share of a GPU's memory that vLLM takes."""
    tensor_parallel_size: int = Field(default=1, ge=1, validation_alias=_names("TENSOR_PARALLEL_SIZE"))
    """GPUs that share the model."""
    pipeline_parallel_size: int = Field(default=1, ge=1, validation_alias=_names("PIPELINE_PARALLEL_SIZE"))
    """Groups of GPUs that each hold some of the layers, also on several nodes."""
    distributed_executor_backend: Literal["", "mp", "ray"] = Field(
        default="", validation_alias=_names("DISTRIBUTED_EXECUTOR_BACKEND")
    )
    """What starts vLLM's workers: `mp` on one node, `ray` on several; empty for vLLM's choice."""
    quantization: str = Field(default="", validation_alias=_names("QUANTIZATION"))
    """vLLM's method, such as `bitsandbytes` or `fp8`; empty for what the model's config says."""
    kv_cache_dtype: str = Field(default="", validation_alias=_names("KV_CACHE_DTYPE"))
    """vLLM's type of the KV cache, such as `fp8`; empty for the model's own."""
    max_num_batched_tokens: int = Field(default=0, ge=0, validation_alias=_names("MAX_NUM_BATCHED_TOKENS"))
    """Tokens of one step of vLLM's; 0 for its choice."""
    enable_prefix_caching: bool | None = Field(default=None, validation_alias=_names("ENABLE_PREFIX_CACHING"))
    """Keep the work on prompts that begin alike; unset for vLLM's choice, which is yes."""
    cpu_offload_gb: float = Field(default=0.0, ge=0, validation_alias=_names("CPU_OFFLOAD_GB"))
    """GiB of weights for each GPU that stay in the machine's memory."""
    enforce_eager: bool | None = Field(default=None, validation_alias=_names("ENFORCE_EAGER"))
    """Skip CUDA graphs and compilation; unset means yes on a CPU and no on a GPU."""
    coalesce_seconds: float = Field(default=0.004, ge=0, le=1)
    """Tokens of one answer that come faster than this go out as one message, the first at once; 0 for no pause."""
    tool_parser: str = Field(default="", validation_alias=_names("TOOL_PARSER", "TOOL_CALL_PARSER"))
    """How the model writes calls of tools, as vLLM names its parsers (`hermes`); empty: no `tool_choice` auto."""
    engine_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, as JSON; they win over the settings above."""

    max_n: int = Field(default=8, ge=1)
    """Most answers to one request."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest answer that a request may ask for."""
    max_prompt_tokens: int = Field(default=0, ge=0)
    """Longest prompt, in tokens; 0 for what the context window allows."""

    session_ttl_seconds: float = Field(default=86400.0, gt=0)
    """How long a session is kept after its last use, when CreateSession says nothing."""
    session_max_ttl_seconds: float = Field(default=30 * 86400.0, gt=0)
    """Longest time that CreateSession may ask for."""
    session_max_per_key: int = Field(default=1000, ge=1)
    """Sessions that one API key may have open."""
    session_max_turns: int = Field(default=1000, ge=1)
    """Turns that a session keeps before it refuses another."""
    session_max_bytes: int = Field(default=1024 * 1024, ge=1)
    """Bytes of UTF-8 that a session's history may have before it refuses another turn."""

    system_prompts_file: Path | None = None
    """YAML file, model name -> system prompt for conversations that bring none; unset for no such prompts."""
    profiles_dir: Path | None = None
    """Folder with response profiles of your own, one YAML file each; unset for the built-in ones alone."""
    profile_reconnect_seconds: float = Field(default=30.0, gt=0, le=3600)
    """How long a profile's stream goes on, and is kept, without its reader: it may come back with Last-Event-ID."""
    profile_heartbeat_seconds: float = Field(default=10.0, gt=0)
    """Silence after which a profile's stream sends a comment, so that proxies keep it open."""
    profile_max_streams: int = Field(default=256, ge=1)
    """Streams of profiles that are kept at once, running ones among them."""

    require_proof: bool = True
    """Refuse adapters without probes and token receipt. Off, such adapters must at least differ from the base."""
    load_on_first_use: bool = True
    """Load an adapter from the store when a request names it."""
    alias_cache_seconds: float = Field(default=1.0, ge=0)
    """How long a name's resolution is remembered: a moved alias is followed within this time."""
    drain_seconds: float = Field(default=60.0, ge=0)
    """How long a change of the base model waits for requests in flight before it ends them."""
    check_interval_seconds: float = Field(default=10.0, ge=0)
    """After so long without a token for any request the engine is asked for one; 0 for never."""
    check_timeout_seconds: float = Field(default=60.0, gt=0)
    """An engine that gives no token for so long hangs and is started again; a first long prompt takes its time."""
    restart_backoff_seconds: float = Field(default=1.0, gt=0)
    """Wait before an engine that failed again is started once more; doubles up to a minute."""

    def engine_options(self, *, trust_remote_code: bool = False) -> EngineOptions:
        """Return the part of the settings that the engine needs."""
        return EngineOptions(
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_lora_rank=self.max_lora_rank,
            max_loaded_adapters=self.max_loaded_adapters,
            max_batch_adapters=self.max_batch_adapters,
            max_concurrent_requests=self.max_concurrent_requests,
            kv_cache_gib=self.kv_cache_gib,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            enforce_eager=self.enforce_eager,
            trust_remote_code=trust_remote_code,
            coalesce_seconds=self.coalesce_seconds,
            extra=self._further_arguments(),
        )

    def _further_arguments(self) -> dict[str, Any]:
        """Return what goes to vLLM as it is: what was set, and over that the engine_arguments."""
        names = (
            *("pipeline_parallel_size", "distributed_executor_backend", "quantization", "kv_cache_dtype"),
            *("max_num_batched_tokens", "enable_prefix_caching", "cpu_offload_gb"),
        )
        fields = type(self).model_fields
        given = {name: getattr(self, name) for name in names if getattr(self, name) != fields[name].default}
        return {**given, **self.engine_arguments}

    def session_limits(self) -> SessionLimits:
        """Return the part of the settings that sessions need."""
        return SessionLimits(
            default_ttl_seconds=min(self.session_ttl_seconds, self.session_max_ttl_seconds),
            max_ttl_seconds=self.session_max_ttl_seconds,
            max_per_key=self.session_max_per_key,
            max_turns=self.session_max_turns,
            max_bytes=self.session_max_bytes,
        )
