"""The server's plain HTTP sides: /metrics and /healthz without any dependency, and the stages' own HTTP apps."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from loraline.core.config import CoreSettings
from loraline.core.errors import failed_precondition
from loraline.core.serving.health import HealthMonitor

_HEAD_BYTES = 16 * 1024
_READ_SECONDS = 10.0
_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 400: "Bad Request", 503: "Service Unavailable"}
Answer = tuple[int, str, bytes]


class MetricsServer:
    """Serves GET /metrics (Prometheus text of a registry) and GET /healthz (200 or 503 with JSON reasons)."""

    def __init__(self, registry: CollectorRegistry, health: HealthMonitor):
        self._registry = registry
        self._health = health
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        """Serve on a bound socket."""
        self._server = await asyncio.start_server(self._connection, sock=listener, limit=_HEAD_BYTES)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = await self._answer(head.decode("latin-1"))
                lines = (
                    f"HTTP/1.1 {status} {_REASONS[status]}",
                    f"Content-Type: {kind}",
                    f"Content-Length: {len(body)}",
                    "Connection: close",
                )
                sends_body = not head.startswith(b"HEAD ")
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (body if sends_body else b""))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ConnectionError):
            pass  # a caller that does not speak HTTP, or went away
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, head: str) -> Answer:
        parts = head.partition("\r\n")[0].split(" ")
        if len(parts) != 3:
            return 400, "text/plain", b"not an HTTP request\n"
        method, path = parts[0], parts[1].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return 405, "text/plain", b"only GET\n"
        if path == "/metrics":
            # Never OpenMetrics, which Prometheus would rather have: there the library writes vllm_… for vllm:….
            encode, kind = choose_encoder("")
            # Collectors may ask the database: not in the event loop.
            return 200, kind, await asyncio.to_thread(encode, self._registry)
        if path == "/healthz":
            reasons = self._health.reasons
            ready = not any(reasons.values())
            document = {"ready": ready, "reasons": reasons}
            return 200 if ready else 503, "application/json", json.dumps(document, ensure_ascii=False).encode() + b"\n"
        return 404, "text/plain", b"there are /metrics and /healthz\n"


class AppServer:
    """Serves one ASGI app with uvicorn in the running event loop, leaving signals to the platform's server."""

    def __init__(self, name: str, app: Any, settings: CoreSettings):
        try:
            import uvicorn
        except ImportError as error:
            text = (
                f"The HTTP side of {name} needs uvicorn. Install it (`pip install uvicorn`), or switch that side off."
            )
            raise failed_precondition("UVICORN_MISSING", text) from error

        class QuietServer(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="auto",
            server_header=False,
            timeout_graceful_shutdown=max(1, int(settings.stop_grace_seconds)),
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ssl_ca_certs=str(settings.tls_client_ca) if settings.tls_client_ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
        )
        self._name = name
        self._server = QuietServer(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, listener: socket.socket) -> None:
        """Serve on a bound socket; returns when the app has started."""
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name=f"http {self._name}")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise failed_precondition(
                    "HTTP_APP_FAILED", f"The HTTP app of {self._name} did not start; see the log."
                )
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop accepting, let requests in flight finish within the grace, then end."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
