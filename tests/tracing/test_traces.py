"""One trace from a caller's span through gRPC, the job's runner and its process; nothing at all where nobody asks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraline.core.serving.addresses import free_port
from loraline.core.testing.otlp import Collector, TakenSpan, otlp_collector

CALLER = """
import sys
from google.protobuf import json_format
from loraline.api.datagen.v1 import datagen_pb2
from loraline.client import Loraline, tracing

request = json_format.Parse(sys.argv[1], datagen_pb2.GenerateDatasetRequest())
with tracing.recording("harbour") as problem, tracing.span("morning"), Loraline.connect() as client:
    assert not problem, problem
    job = client.datagen.generate(request)
    print(client.jobs.wait(job.name).name)
"""
POOLS = {"place": {"items": [{"text": f"pier {n}"} for n in range(12)]}}
TEMPLATE = {"rows": 12, "pools": POOLS, "templates": [{"prompt": "Where is {place}?", "response": "{place} is west."}]}
SECRET = "sk-verysecretvalue123"
REQUEST = json.dumps({"name": "piers", "sources": [{"template": TEMPLATE}]})


@dataclass
class Server:
    """A datagen server, and the environment of those who call it."""

    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes]

    def call(self, code: str, *arguments: str, **environment: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr + self.log.read_text()
        return done.stdout.strip()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()


@contextmanager
def serving(folder: Path, *interpreter: str, **variables: str) -> Iterator[Server]:
    address, log = f"127.0.0.1:{free_port()}", folder / "log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LORALINE_", "OTEL_"))}
    own = {
        "LORALINE_DATA_DIR": str(folder / "data"),
        "LORALINE_LISTEN": address,
        "LORALINE_METRICS_LISTEN": "",
        "LORALINE_POLL_SECONDS": "0.1",
    }
    command = [sys.executable, *(interpreter or ("-m", "loraline.datagen"))]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=clean | own | variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while b'"serving"' not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        key = (folder / "data" / "client.key").read_text().strip()
        caller = {"LORALINE_ADDRESS": address, "LORALINE_API_KEY": key, "LORALINE_DATA_DIR": str(folder / "caller")}
        yield Server(clean | caller | variables, log, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with otlp_collector() as running:
        yield running


def variables(collector: Collector, protocol: str) -> dict[str, str]:
    endpoint = collector.grpc if protocol == "grpc" else collector.http
    # Batches go out every tenth of a second, so that nothing is left when a process is killed.
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


def lineage(spans: list[TakenSpan], span: TakenSpan) -> list[tuple[str, str]]:
    """Return service and name of a span and its ancestors, the first of the trace first."""
    parents = {other.id: other for other in spans}
    chain = [span]
    while chain[0].parent:
        chain.insert(0, parents[chain[0].parent])
    return [(link.service, link.name) for link in chain]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_one_trace_from_the_caller_to_the_jobs_process(collector: Collector, tmp_path: Path, protocol: str) -> None:
    with serving(tmp_path, **variables(collector, protocol)) as server:
        job = server.call(CALLER, REQUEST)
        server.stop()
    (root,) = [span for span in collector.spans() if span.name == "morning"]
    spans = collector.spans(root.trace)
    (published,) = [span for span in spans if span.name == "artifact publish"]
    assert lineage(spans, published) == [
        ("harbour", "morning"),
        ("loraline-datagen", "loraline.api.datagen.v1.DatagenService/GenerateDataset"),
        ("loraline-datagen", "job datagen.generate"),
        ("loraline-datagen", "datagen.generate"),
        ("loraline-datagen", "artifact publish"),
    ]
    (runner,) = [span for span in spans if span.name == "job datagen.generate"]
    assert (runner.facts["loraline.job"], runner.facts["loraline.state"]) == (job, "SUCCEEDED")
    assert not [span for span in spans if span.failed]
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    told = {line["event"]: line for line in lines if line.get("trace_id") == root.trace}
    assert {"job_submitted", "job_started", "job_left"} <= told.keys()
    assert told["job_submitted"]["job"] == job and told["job_submitted"]["request_id"]


def test_a_batch_systems_span_is_passed_on_by_callers_without_opentelemetry(
    collector: Collector, tmp_path: Path
) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serving(tmp_path, **variables(collector, "grpc")) as server:
        server.call(CALLER, REQUEST, OTEL_SDK_DISABLED="true", TRACEPARENT=f"00-{trace}-b7ad6b7169203331-01")
        server.stop()
    names = {span.name for span in collector.spans(trace)}
    assert {"job datagen.generate", "datagen.generate", "artifact publish"} <= names


def test_failed_jobs_and_calls_are_marked(collector: Collector, tmp_path: Path) -> None:
    broken = REQUEST.replace('"rows": 12', '"rows": 500')  # more than the pools can give
    code = CALLER.replace("print(client.jobs.wait(job.name).name)", "client.jobs.wait(job.name)")
    with serving(tmp_path, **variables(collector, "grpc")) as server:
        server.call(code, broken)
        server.stop()
    failed = {span.name: span.why for span in collector.spans() if span.failed}
    assert failed["job datagen.generate"] == "the job failed"
    assert failed["datagen.generate"]


def test_a_secret_in_an_error_is_in_no_span(collector: Collector) -> None:
    """The spans of the client, of a server's block, and of a call's details."""
    code = f"""
from loraline.client import tracing as client
from loraline.core import tracing

def leaks():
    raise RuntimeError("api_key={SECRET} leaked")

with client.recording("harbour"):
    try:
        with client.span("morning"):
            leaks()
    except RuntimeError:
        pass
with tracing.recording(["inference"]):
    try:
        with tracing.span("block"):
            leaks()
    except RuntimeError:
        pass
    with tracing.span("details") as span:
        span.fail("the store says api_key={SECRET}")
"""
    environment = {**os.environ, **variables(collector, "grpc")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    spans = {span.name: span for span in collector.spans()}
    assert all(spans[name].failed for name in ("morning", "block", "details"))
    assert spans["morning"].why == "RuntimeError" and not spans["morning"].told
    assert spans["block"].why.startswith("RuntimeError: ") and spans["block"].why.endswith("leaked")
    assert spans["details"].why.startswith("the store says")
    assert SECRET not in repr(collector.spans())


def test_nothing_is_imported_where_nobody_asks(tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('imported:', sorted(m for m in sys.modules if m.startswith('opentelemetry'))))\n"
        "from loraline.core.serving.server import run\nfrom loraline.datagen.component import build\nrun([build])"
    )
    with serving(tmp_path, "-c", code) as server:
        server.call(CALLER, REQUEST, TRACEPARENT="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        server.stop()
        assert "imported: []" in server.log.read_text()


def test_without_the_packages_a_server_says_so_and_serves(collector: Collector, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from loraline.core.serving.server import run\nfrom loraline.datagen.component import build\nrun([build])"
    )
    with serving(tmp_path, "-c", code, **variables(collector, "grpc")) as server:
        server.call(CALLER, REQUEST, OTEL_SDK_DISABLED="true")
        server.stop()
    assert "loraline-core[otel]" in server.log.read_text()


def test_a_collector_out_of_reach_and_wrong_variables_hold_nothing_up(tmp_path: Path) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with serving(tmp_path, **given) as server:
        begun = time.monotonic()
        server.call(CALLER.replace('recording("harbour")', "recording()"), REQUEST, OTEL_SDK_DISABLED="true")
        assert time.monotonic() - begun < 30
    (tmp_path / "second").mkdir()
    with serving(tmp_path / "second", **given, OTEL_EXPORTER_OTLP_PROTOCOL="carrier pigeon") as server:
        server.call(CALLER, REQUEST, OTEL_SDK_DISABLED="true")
        server.stop()
    assert "carrier pigeon" in server.log.read_text()


def test_http_requests_are_spans_named_by_their_route(collector: Collector) -> None:
    code = """
import asyncio, sys
import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from loraline.core import tracing
from loraline.core.serving.http_auth import HttpKeyAuth

async def session(request):
    if request.path_params["name"] == "bad":
        raise RuntimeError("api_key=SECRET leaked")
    return PlainTextResponse(str(bool(tracing.carrier())))

async def main():
    app = HttpKeyAuth(Starlette(routes=[Route("/v1/sessions/{name}", session)]), None)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as web:
        print((await web.get("/v1/sessions/abc", headers={"traceparent": sys.argv[1]})).text)
        await web.get("/v1/sessions/bad")
        await web.get("/nowhere")
        await web.get("/health")

with tracing.recording(["inference"]):
    asyncio.run(main())
""".replace("SECRET", SECRET)
    trace = "0af7651916cd43dd8448eb211c80319d"
    environment = {**os.environ, **variables(collector, "grpc")}
    done = subprocess.run(
        [sys.executable, "-c", code, f"00-{trace}-b7ad6b7169203331-01"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr
    (good,) = collector.spans(trace)
    assert (good.name, good.service, good.parent) == (
        "GET /v1/sessions/{name}",
        "loraline-inference",
        "b7ad6b7169203331",
    )
    assert good.facts["http.response.status_code"] == 200 and not good.failed
    (bad,) = [span for span in collector.spans() if span.failed]
    assert bad.facts["url.path"] == "/v1/sessions/bad" and bad.why
    assert SECRET not in repr(collector.spans())
    assert {span.name for span in collector.spans()} == {"GET /v1/sessions/{name}", "GET"}
