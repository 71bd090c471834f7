"""Readiness, disk and GPU memory as series. The GPU's answers come from a stand-in for nvidia-smi: a fault double."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from loraline.core.jobs.telemetry import Telemetry, series
from loraline.core.serving.machine import DiskMetrics, GpuMetrics, ReadinessMetrics
from loraline.core.serving.metrics import MOST_SERIES, JobMetrics


def _samples(collector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}


def test_readiness_follows_the_reasons() -> None:
    reasons = {"inference": "The model is loading.", "database": ""}
    collector = ReadinessMetrics(lambda: reasons)
    assert _samples(collector) == {'loraline_ready{part="inference"}': 0, 'loraline_ready{part="database"}': 1}
    reasons["inference"] = ""
    assert _samples(collector)['loraline_ready{part="inference"}'] == 1


def test_disk_is_that_of_the_data_folder_and_a_lost_folder_ends_no_scrape(tmp_path: Path) -> None:
    found = _samples(DiskMetrics(tmp_path))
    assert found["loraline_data_dir_size_bytes"] == shutil.disk_usage(tmp_path).total
    assert 0 <= found["loraline_data_dir_free_bytes"] <= found["loraline_data_dir_size_bytes"]
    assert _samples(DiskMetrics(tmp_path / "gone")) == {}


def _nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_gpu_memory_in_bytes_by_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvidia_smi(tmp_path, monkeypatch, "echo '0, 1024, 81920'; echo '1, 0, 81920'")
    found = _samples(GpuMetrics())
    assert found['loraline_gpu_memory_used_bytes{gpu="0"}'] == 1024**3
    assert found['loraline_gpu_memory_used_bytes{gpu="1"}'] == 0
    assert found['loraline_gpu_memory_size_bytes{gpu="1"}'] == 80 * 1024**3


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo '0, [N/A], 4'"])
def test_a_driver_that_fails_ends_no_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    _nvidia_smi(tmp_path, monkeypatch, script)
    assert _samples(GpuMetrics()) == {}


def test_no_gpu_no_series(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _samples(GpuMetrics()) == {}


def test_series_that_jobs_make_are_bounded_and_totals_stay_right() -> None:
    registry = CollectorRegistry()
    told = JobMetrics(registry)
    told.accept(
        calls=Counter("calls", "Calls.", ["model"], registry=registry),
        speed=Gauge("speed", "Speed.", ["model"], registry=registry),
    )
    many = MOST_SERIES + 50
    counts = {series("calls", {"model": f"m{n}"}): 1.0 for n in range(many)}
    gauges = {series("speed", {"model": f"m{n}"}): 1.0 for n in range(many)}
    told.job_told("kind", "job", Telemetry(counts, gauges))
    lines = generate_latest(registry).decode().splitlines()
    calls = {line: float(line.split()[-1]) for line in lines if line.startswith("calls_total{")}
    assert len(calls) == MOST_SERIES + 1
    assert sum(calls.values()) == many
    assert 'calls_total{model="other"} 50.0' in calls
    assert len([line for line in lines if line.startswith("speed{")]) == MOST_SERIES
    told.job_gone("kind", "job")
    assert not [line for line in generate_latest(registry).decode().splitlines() if line.startswith("speed{")]
