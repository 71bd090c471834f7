"""What a server's log tells: which call, by whom, which job; and ids that callers can send and read."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import structlog

from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.core.logging import configure


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Log as JSON, and return what reads the lines so far."""
    root = logging.getLogger()
    before, written = (root.handlers[:], root.level), io.StringIO()
    configure("json", "info")
    handler: Any = root.handlers[0]
    handler.setStream(written)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.handlers[:], root.level = before
    structlog.reset_defaults()


async def failing_call(running: Any, *metadata: tuple[str, str]) -> str:
    """Ask for a job that there is not, and return the id in the answer."""
    async with grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub: Any = job_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.GetJob(job_pb2.GetJobRequest(name="nobody"), metadata=metadata, timeout=10)
        trailing: Any = failure.value.trailing_metadata()
        return dict(trailing)["x-request-id"]


async def test_a_failed_call_is_found_in_the_log_by_its_id(server: Any, lines: Callable[[], list[Any]]) -> None:
    async with server() as running:
        ours = await failing_call(running, *running.metadata(), ("x-request-id", "night-7.b"))
        made = await failing_call(running, *running.metadata())
        bad = await failing_call(running, *running.metadata(), ("x-request-id", 'x" or more'))
        keyless = await failing_call(running, ("x-request-id", "no-key"))
    assert ours == "night-7.b" and keyless == "no-key"
    assert len(made) == len(bad) == 16 and made != bad
    told = {line["request_id"]: line for line in lines() if line["event"] == "call_failed"}
    assert told.keys() == {ours, made, bad, keyless}
    facts = {name: told[ours][name] for name in ("method", "key", "code", "reason", "level")}
    assert facts == {
        "method": "/loraline.api.job.v1.JobService/GetJob",
        "key": "first",
        "code": "NOT_FOUND",
        "reason": "JOB_NOT_FOUND",
        "level": "info",
    }
    assert told[keyless]["reason"] == "MISSING_KEY" and "key" not in told[keyless]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Log a line and answer."""
    if scope["type"] == "http":
        structlog.get_logger("stage").info("at_work")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def test_every_http_answer_has_an_id_that_the_log_knows(server: Any, lines: Callable[[], list[Any]]) -> None:
    async with server(http_app=app) as running, httpx.AsyncClient() as client:
        url = f"http://{running.addresses.http['inference']}/v1/models"
        refused = await client.get(url, headers={"X-Request-Id": "web-1"})
        served = await client.get(url, headers={"Authorization": f"Bearer {running.key}"})
    told = {line["request_id"]: line for line in lines() if "request_id" in line}
    assert refused.status_code == 401 and refused.headers["x-request-id"] == "web-1"
    assert told["web-1"]["reason"] == "MISSING_KEY"
    mine = told[served.headers["x-request-id"]]
    assert (mine["event"], mine["method"], mine["key"]) == ("at_work", "/v1/models", "first")


LINE = (
    "from loraline.core.logging import configure; configure(); import structlog;"
    "structlog.get_logger('loraline.test').info('hello', job='j-1')"
)


def test_pythons_warnings_are_lines_too() -> None:
    code = "import warnings; from loraline.core.logging import *; configure(); warnings.warn('api_key=sk-1234567')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    line = json.loads(done.stderr)
    assert (line["level"], line["logger"]) == ("warning", "py.warnings")
    assert "api_key=***" in line["event"]


def test_json_in_a_pipe_and_pretty_on_a_terminal() -> None:
    piped = subprocess.run([sys.executable, "-c", LINE], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(piped.stderr)["job"] == "j-1"
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", LINE], stderr=follower, timeout=60, check=True)
    os.close(follower)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert "hello" in shown and not shown.startswith("{")
