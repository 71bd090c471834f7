"""What GET /metrics says to a real Prometheus, which asks for OpenMetrics first."""

from __future__ import annotations

import asyncio
import urllib.request
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from loraline.core.serving.addresses import bind
from loraline.core.serving.http import MetricsServer

# As Prometheus 2 and 3 send it.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def _get(port: int, accept: str) -> tuple[str, list[str]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode().splitlines()


async def test_names_with_a_colon_keep_it_whatever_is_asked_for() -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "As vLLM names it.", ["model_name"], registry=registry).labels("m").set(2)
    Counter("loraline_things", "Things.", registry=registry).inc()
    health: Any = SimpleNamespace(reasons={})
    server = MetricsServer(registry, health)
    listener = bind("127.0.0.1:0", "LORALINE_METRICS_LISTEN")
    await server.start(listener)
    try:
        port = listener.getsockname()[1]
        for accept in (ACCEPT, "application/openmetrics-text;version=1.0.0", "text/plain;version=0.0.4", "*/*"):
            kind, lines = await asyncio.to_thread(_get, port, accept)
            assert kind.startswith("text/plain; version=0.0.4")
            assert 'vllm:num_requests_running{model_name="m"} 2.0' in lines
            assert "loraline_things_total 1.0" in lines
    finally:
        await server.stop()
