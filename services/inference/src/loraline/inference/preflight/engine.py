"""What the engine needs of this machine: GPU memory, a compiler, AMX, its port and a whole model."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from loraline.core.preflight import Finding, Place
from loraline.core.preflight.finding import ok
from loraline.core.preflight.machine import port
from loraline.inference.config import InferenceSettings
from loraline.inference.engines.amx import has_amx
from loraline.inference.preflight.gpu import check_gpus, cuda_library, cuda_of_torch, has_gpu, without_gpu

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def checks(_: Place) -> Iterator[Finding]:
    """Look at everything the stage needs; for `loraline doctor`."""
    settings = InferenceSettings()
    if settings.http_listen:
        yield port("port HTTP", settings.http_listen, "LORALINE_INFERENCE_HTTP_LISTEN")
    yield from check_engine(settings)


def check_engine(settings: InferenceSettings) -> Iterator[Finding]:
    """Look at what the engine itself needs. Blocking, for some tenths of a second."""
    on_gpu = has_gpu()
    needed = settings.tensor_parallel_size * settings.pipeline_parallel_size
    if on_gpu:
        yield from check_gpus(settings.gpu_memory_utilization, needed)
        if (built := cuda_of_torch()) is not None:
            yield cuda_library(built)
    else:
        yield without_gpu()
    yield compiler(on_gpu=on_gpu, eager=bool(settings.enforce_eager))
    if not on_gpu:
        yield amx()


def compiler(*, on_gpu: bool, eager: bool) -> Finding:
    """Tell whether Triton can compile: a C compiler and Python's headers. On a CPU the engine does without."""
    found = next((name for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and shutil.which(name)), "")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if found and (headers.is_file() or not on_gpu):
        return ok("C compiler", f"{found} is there")
    missing = "there is no C compiler" if not found else f"{headers} is missing"
    if not on_gpu:
        return ok("C compiler", f"{missing}; on a CPU the engine does without, somewhat slower")
    said = f"{missing}, and kernels are compiled while the model runs"
    return Finding("C compiler", "warning" if eager else "failed", said, "C_COMPILER_MISSING")


def amx(cpuinfo: Path = Path("/proc/cpuinfo"), permitted: bool | None = None) -> Finding:
    """Tell whether the kernel lets processes use this CPU's AMX tiles, as the engine will ask it to."""
    if not has_amx(cpuinfo):
        return ok("AMX", "this CPU has none")
    if _permitted() if permitted is None else permitted:
        return ok("AMX", "the kernel permits it")
    return Finding("AMX", "warning", "this CPU has AMX, but the kernel does not permit its use here", "AMX_REFUSED")


def _permitted() -> bool:
    if platform.system() != "Linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    return int(library.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0
