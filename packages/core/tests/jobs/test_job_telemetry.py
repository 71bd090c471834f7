"""Counters and gauges of jobs' processes in the metrics of the service."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from loraline.core.config import CoreSettings
from loraline.core.jobs.queue import JobQueue
from loraline.core.jobs.runner import JobRunner
from loraline.core.jobs.telemetry import Telemetry, TelemetryPipe, TelemetryWriter, series
from loraline.core.logging import configure
from loraline.core.serving.metrics import JobMetrics
from loraline.core.testing import jobs as testing
from loraline.core.testing.waiting import until

StartRunner = Callable[..., Awaitable[JobRunner]]
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Service:
    """The metrics of a service that runs the counting job."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = JobMetrics(self.registry)
        self.metrics.accept(
            test_steps=Counter("test_steps", "Steps.", ["parity"], registry=self.registry),
            test_step=Gauge("test_step", "Step.", registry=self.registry),
            test_limit=Gauge("test_limit", "Limit.", ["endpoint"], registry=self.registry),
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
def service() -> Service:
    return Service()


@on_sqlite
async def test_what_a_child_counts_stands_in_the_services_metrics(
    queue: JobQueue, settings: CoreSettings, start_runner: StartRunner, service: Service
) -> None:
    runner = await start_runner(observer=service.metrics)
    for _ in range(2):
        await queue.submit(testing.COUNT, testing.struct(to=7, seconds=0.01))
    await until(lambda: service.value("test_steps_total", parity="even") == 6, "all steps of both jobs")
    assert service.value("test_steps_total", parity="odd") == 8
    await until(lambda: not runner.running, "the last supervisor")
    assert service.value("test_step") == 0


@on_sqlite
async def test_figures_show_while_the_job_runs_and_a_kill_keeps_the_counts(
    queue: JobQueue, settings: CoreSettings, start_runner: StartRunner, service: Service
) -> None:
    runner = await start_runner(observer=service.metrics, max_attempts=1)
    job = await queue.submit(testing.COUNT, testing.struct(to=10_000, seconds=0.02))
    await until(lambda: (service.value("test_step") or 0) > 3, "a live gauge")
    os.kill(runner.child_pids[job.name], signal.SIGKILL)
    await until(lambda: not runner.running, "the supervisor's end")
    assert service.value("test_step") == 0
    assert (service.value("test_steps_total", parity="odd") or 0) >= 2


def test_a_full_pipe_stalls_nothing_and_loses_nothing() -> None:
    pipe = TelemetryPipe()
    writer = TelemetryWriter(pipe.child_end)
    total = 0.0
    for number in range(3000):
        writer.count("rows", 1, {"outcome": f"{number % 50}-{'x' * 200}"})
        writer.flush()
    for _ in range(100):
        total += sum(sum(told.counts.values()) for told in pipe.take())
        writer.flush()
    assert total == 3000
    pipe.close()


def test_lines_that_make_no_sense_are_passed_over() -> None:
    pipe = TelemetryPipe()
    good = Telemetry({series("a", {"l": "1"}): 2.0}, {series("g", {}): 1.0})
    os.write(pipe.child_end, b"rubbish\n[1]\n" + good.to_line() + b'[[["x"]],[]]\n[[],[')
    assert pipe.take() == [good]
    os.write(pipe.child_end, b"]]\n")
    assert pipe.take() == [Telemetry()]
    pipe.close()


def test_gauges_of_two_jobs_and_figures_that_nobody_declared(service: Service) -> None:
    key = series("test_limit", {"endpoint": "a"})
    service.metrics.job_told("k", "one", Telemetry({}, {key: 4.0}))
    service.metrics.job_told("k", "two", Telemetry({series("nobody", {}): 1.0}, {key: 3.0}))
    assert service.value("test_limit", endpoint="a") == 3
    service.metrics.job_gone("k", "two")
    assert service.value("test_limit", endpoint="a") == 4
    service.metrics.job_gone("k", "one")
    assert service.value("test_limit", endpoint="a") is None
    service.metrics.job_told("k", "one", Telemetry({series("test_steps", {"wrong": "label"}): 1.0}, {}))


@on_sqlite
async def test_what_a_job_remarks_stands_in_the_services_log(
    queue: JobQueue, start_runner: StartRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    configure("json", "info")
    try:
        await start_runner()
        whose = {"run": "mareva"}
        counted = await queue.submit(testing.COUNT, testing.struct(to=1, seconds=0), labels=whose)
        crashed = await queue.submit(testing.CRASH, testing.struct(how="typed"))
        lines: list[dict[str, Any]] = []
        await until(lambda: _left(lines, capsys, 2), "both jobs' ends")
    finally:
        root.handlers[:], root.level = before
        structlog.reset_defaults()
    told = {(line["job"], line["event"]): line for line in lines if "job" in line}
    start = told[counted.name, "Start at 0"]
    assert (start["kind"], start["attempt"], start["reason"]) == ("test.count", 1, "COUNT_START")
    assert (start["level"], start["source"], start["fields"]) == ("info", "loraline.job", {"done": "0"})
    failure = told[crashed.name, "Row 7 of train.jsonl has no messages."]
    assert (failure["level"], failure["reason"]) == ("error", "ROW_INVALID")
    assert told[crashed.name, "job_left"]["state"] == "FAILED"
    for event in ("job_submitted", "job_started", "Start at 0", "job_left"):
        assert told[counted.name, event]["labels"] == whose, event
    assert "labels" not in told[crashed.name, "job_left"]


def _left(lines: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], jobs: int) -> bool:
    lines += [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    return sum(line["event"] == "job_left" for line in lines) == jobs


def test_a_flood_of_remarks_keeps_the_newest_and_blocks_nobody() -> None:
    pipe = TelemetryPipe()
    writer = TelemetryWriter(pipe.child_end)
    for number in range(5000):
        writer.remark({"event": "x" * 100, "number": number})
    writer.flush()
    found: list[dict[str, Any]] = []
    for _ in range(100):
        pipe.take()
        found += pipe.take_remarks()
        writer.flush()
    assert found[-1]["number"] == 4999 and len(found) < 5000
    assert [remark["number"] for remark in found] == sorted(remark["number"] for remark in found)
    pipe.close()
