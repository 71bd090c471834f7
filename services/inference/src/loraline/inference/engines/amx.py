"""Asks the kernel for AMX in every vLLM process before oneDNN uses it.

On Linux a process must ask before it may touch the AMX tile registers; vLLM's engine-core process on a CPU does not,
and dies of SIGILL (exit -4, EngineDeadError) at its first matrix product. vLLM calls the `vllm.general_plugins` entry
points in each of its processes, so :func:`enable` is one.
"""

from __future__ import annotations

import platform
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this is x86 Linux on a CPU with AMX tiles, as the kernel lists its flags."""
    if platform.system() != "Linux" or platform.machine().lower() not in {"x86_64", "amd64"}:
        return False
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "amx_tile" in flags.split()


def enable() -> bool:
    """Ask for AMX where there is any; return whether it was granted. Does nothing, and never raises, elsewhere."""
    if not has_amx():
        return False
    try:
        import torch

        granted = bool(torch.cpu._init_amx())
    except (ImportError, AttributeError, RuntimeError) as error:
        _log.warning("amx_request_failed", error=str(error))
        return False
    if not granted:
        _log.warning("amx_refused", remedy="set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 if the engine dies with exit -4")
    return granted
