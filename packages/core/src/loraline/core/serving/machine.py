"""Series of the server itself: whether it is ready, and how much disk and GPU memory its machine has left."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

log = structlog.get_logger("loraline.metrics")
_GPU_SECONDS = 5.0
_GPU_QUERY = ("--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits")
_MIB = 1024 * 1024


class ReadinessMetrics(Collector):
    """`loraline_ready{part}`: what /healthz says, as figures that an alert can wait for."""

    def __init__(self, reasons: Callable[[], Mapping[str, str]]):
        self._reasons = reasons

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the family without series."""
        text = "Whether a part (a stage, database, server) is ready: 1, or 0; /healthz tells why not."
        return [GaugeMetricFamily("loraline_ready", text, labels=("part",))]

    def collect(self) -> Iterator[Metric]:
        """Yield one series for each part that was asked."""
        (ready,) = self.describe()
        for part, reason in self._reasons().items():
            ready.add_metric((part,), 0.0 if reason else 1.0)
        yield ready


class DiskMetrics(Collector):
    """Size of, and room on, the file system that holds the data folder: checkpoints, workdirs and caches."""

    def __init__(self, folder: Path):
        self._folder = folder

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the families without series."""
        return [
            GaugeMetricFamily("loraline_data_dir_size_bytes", "Size of the data folder's file system."),
            GaugeMetricFamily("loraline_data_dir_free_bytes", "Room left on the data folder's file system."),
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield both gauges; none while the folder cannot be read."""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError as error:
            log.warning("data folder cannot be read for metrics", error=str(error))
            return
        size, free = self.describe()
        size.add_sample(size.name, {}, usage.total)
        free.add_sample(free.name, {}, usage.free)
        yield from (size, free)


class GpuMetrics(Collector):
    """Memory of the machine's NVIDIA GPUs as `nvidia-smi` tells it; no series where there is none.

    The driver brings nvidia-smi into every container with a GPU, so no stage needs a package for it.
    """

    def __init__(self) -> None:
        self._command = shutil.which("nvidia-smi")

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the families without series."""
        return [
            GaugeMetricFamily("loraline_gpu_memory_size_bytes", "Memory of a GPU.", labels=("gpu",)),
            GaugeMetricFamily(
                "loraline_gpu_memory_used_bytes", "Memory of a GPU that any process holds.", labels=("gpu",)
            ),
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield both gauges for each GPU."""
        if self._command is None:
            return
        size, used = self.describe()
        for gpu, used_mib, size_mib in self._ask(self._command):
            size.add_metric((gpu,), size_mib * _MIB)
            used.add_metric((gpu,), used_mib * _MIB)
        yield from (size, used)

    def _ask(self, command: str) -> list[tuple[str, float, float]]:
        try:
            told = subprocess.run(
                [command, *_GPU_QUERY], capture_output=True, text=True, timeout=_GPU_SECONDS, check=True
            )
            rows = [[field.strip() for field in line.split(",")] for line in told.stdout.splitlines() if line.strip()]
            return [(gpu, float(used), float(size)) for gpu, used, size in rows]
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            log.warning("GPU memory cannot be read for metrics", error=str(error))
            return []
