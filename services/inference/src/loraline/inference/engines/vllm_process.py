"""Starts and ends vLLM's processes, with the arguments that our settings mean."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from loraline.inference.engines import amx, compiler, last_words, watch
from loraline.inference.engines.memory import float32_on_cpu
from loraline.inference.engines.port import EngineOptions

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_log = structlog.get_logger(__name__)
_REAP_SECONDS = 2.0
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts as max_lora_rank."""


def build(folder: Path, options: EngineOptions) -> AsyncLLM:
    """Build the engine; blocking. Environment first: vLLM reads it when it is imported and in its children."""
    # Never fork: this process runs gRPC threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    amx.enable()
    watch.claim()
    last_words.listen()
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        compiler.do_without()
    arguments = engine_arguments(folder, options, on_cpu=on_cpu)
    _log.info("vllm_starting", model=str(folder), **{k: arguments[k] for k in ("dtype", "max_lora_rank", "max_loras")})
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except Exception as error:
        # vLLM's own error says only that another process failed.
        words = last_words.said()
        last_words.forget()
        raise RuntimeError(f"{words}\n{error}" if words else str(error)) from error


def engine_arguments(folder: Path, options: EngineOptions, *, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's AsyncEngineArgs; pure."""
    dtype = options.dtype
    if dtype == "auto" and on_cpu and float32_on_cpu(folder):
        dtype = "float32"
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype,
        "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        "enable_lora": True,
        "max_lora_rank": next((rank for rank in _RANKS if rank >= options.max_lora_rank), _RANKS[-1]),
        "max_loras": min(options.max_batch_adapters, options.max_loaded_adapters),
        # Our own registry swaps adapters; vLLM must never drop one that we believe is loaded. One more than we keep:
        # the newcomer is proven before the oldest goes.
        "max_cpu_loras": options.max_loaded_adapters + 1,
        "max_num_seqs": options.max_concurrent_requests,
        "trust_remote_code": options.trust_remote_code,
        # Random or small models loop on newlines until max_tokens where JSON allows whitespace.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if options.max_model_len:
        arguments["max_model_len"] = options.max_model_len
    if on_cpu:  # in bytes: VLLM_CPU_KVCACHE_SPACE, which stays stronger where it is set, takes only whole GiB
        arguments["kv_cache_memory_bytes"] = round(options.kv_cache_gib * 1024**3)
    else:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        arguments["tensor_parallel_size"] = options.tensor_parallel_size
    return {**arguments, **options.extra}


def how_it_ended(llm: AsyncLLM) -> str:
    """Return what a dead engine's processes said, the cause first, else the signals that ended them; before shut_down.

    A process that the kernel killed had no time for words, and one that native code aborted may have had none.
    """
    manager: Any = getattr(getattr(llm.engine_core, "resources", None), "engine_manager", None)
    ended = manager.finished_procs() if manager is not None and hasattr(manager, "finished_procs") else {}
    signals = {name: -code for name, code in ended.items() if code < 0 and code != -signal.SIGTERM}
    words = "" if signal.SIGKILL in signals.values() else last_words.said(at_the_end=True)
    return words or "\n".join(_signal_said(name, number) for name, number in signals.items())


def _signal_said(process: str, number: int) -> str:
    return f"The engine's process {process} was ended by signal {number} ({signal.strsignal(number) or 'unknown'})"


def shut_down(llm: AsyncLLM) -> None:
    """Shut down and reap: vLLM kills an engine core that is slow to end without waiting for it, leaving a zombie."""
    cores = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    llm.shutdown()
    for core in cores:
        core.join(_REAP_SECONDS)
    last_words.forget()
