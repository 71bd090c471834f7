"""How jobs end: errors that explain themselves, logs without secrets, patience, and the pace of events."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError, unavailable
from loraline.core.jobs import endings
from loraline.core.jobs.handlers import JobPaused
from loraline.core.jobs.model import FAILED, PAUSED
from loraline.core.jobs.pacing import EventPace
from loraline.core.jobs.patience import patiently
from loraline.core.jobs.redact import redact
from loraline.core.jobs.workdir import begin_log, log_tail


def test_pause_with_a_time():
    when = datetime(2026, 5, 1, 12, tzinfo=UTC)
    end = endings.paused(JobPaused("QUOTA_EXHAUSTED", "tomorrow", when))
    assert end.state == PAUSED and end.pause is not None
    assert end.pause.retry_time.ToDatetime(UTC) == when


def test_crashes_name_type_frame_and_no_secret(monkeypatch):
    monkeypatch.setenv("PROVIDER_API_KEY", "abcdef-123456")
    try:
        raise KeyError("call with abcdef-123456 was refused")
    except KeyError as error:
        end = endings.failed(error, CoreSettings())
    assert end.state == FAILED and end.error is not None
    error = LoralineError.from_status(end.error)
    assert error.code is grpc.StatusCode.INTERNAL and error.reason == "JOB_CRASHED"
    assert "KeyError" in error.message and "test_job_endings.py" in error.metadata["frame"]
    assert "abcdef-123456" not in str(end.error)


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefgh12345",
        "hf_abcdefghijkl",
        "Bearer abcdefghijklmnop",
        "password = hunter22",
        '"api_key": "qwertz"',
    ],
)
def test_secrets_by_shape(secret: str):
    assert "[secret]" in redact(f"before {secret} after") and secret not in redact(f"before {secret} after")


def test_database_passwords_and_harmless_text():
    assert redact("postgresql://user:pa55@host/db") == "postgresql://[secret]@host/db"
    for text in ("Loss 0.34 at step 20, tokens: 300", "http://host:8080/path?x=1", "token_accuracy 0.97"):
        assert redact(text) == text


def test_log_tail_and_rotation(tmp_path: Path):
    assert log_tail(tmp_path) == ""
    for attempt in range(1, 9):
        begin_log(tmp_path, attempt).write_text(f"attempt {attempt}\n" + "x" * 5000 + "\nlast line s3cr3t-value\n")
    tail = log_tail(tmp_path, ["s3cr3t-value"])
    assert tail.endswith("last line [secret]") and len(tail) <= 2048
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.3.txt",
        *(f"log.{n}.txt" for n in range(4, 8)),
        "log.txt",
    ]


def test_event_pace_thins_out():
    pace = EventPace()
    ten_minutes = sum(pace.due(second) for second in range(600))
    five_hours = ten_minutes + sum(pace.due(second) for second in range(600, 18_000))
    week = five_hours + sum(pace.due(second) for second in range(18_000, 7 * 86_400))
    assert ten_minutes == 600
    assert five_hours < 3_000
    assert week < 23_000


def test_patience_ends():
    calls: list[float] = []

    def fail() -> None:
        calls.append(time.monotonic())
        raise unavailable("DATABASE_UNREACHABLE", "no route")

    with pytest.raises(LoralineError):
        patiently(fail, 0.5)
    assert 2 <= len(calls) <= 4
    assert patiently(lambda: 5) == 5
