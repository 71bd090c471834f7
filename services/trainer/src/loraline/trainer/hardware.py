"""What the machine has, without torch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """Memory in bytes."""

    gpu: str = ""
    """Name of the first GPU; empty without one."""
    gpu_memory: int = 0
    gpus: int = 0
    memory: int = 0
    """Main memory that is free for a new process; 0 when unknown."""


def look() -> Hardware:
    """Ask nvidia-smi and the kernel; a second at most."""
    name, gpu_memory, gpus = _gpus()
    return Hardware(name, gpu_memory, gpus, _available_memory())


def _gpus() -> tuple[str, int, int]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "", 0, 0
    asked = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout
        name, _, mebibytes = answer.splitlines()[0].rpartition(",")
        return name.strip(), int(mebibytes) * 2**20, len(answer.splitlines())
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", 0, 0


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
