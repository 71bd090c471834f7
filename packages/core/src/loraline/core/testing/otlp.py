"""A collector of traces for tests: takes what OpenTelemetry's exporters send, by gRPC and by HTTP, and keeps it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class TakenSpan:
    """A span as it came in; ids are hex, `parent` is empty for the first of a trace."""

    name: str
    service: str
    trace: str
    id: str
    parent: str
    failed: bool
    why: str
    """What its status says."""
    facts: dict[str, Any]
    told: tuple[dict[str, Any], ...]
    """The attributes of its events."""


@dataclass
class Collector:
    """What came in so far, and where to send it."""

    grpc: str = ""
    """http://host:port for the protocol grpc."""
    http: str = ""
    """http://host:port for the protocol http/protobuf."""
    _spans: list[TakenSpan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        """Keep the spans of a request."""
        with self._lock:
            for group in request.resource_spans:
                service = next((a.value.string_value for a in group.resource.attributes if a.key == "service.name"), "")
                self._spans += [_taken(service, span) for scope in group.scope_spans for span in scope.spans]

    def spans(self, trace: str = "") -> list[TakenSpan]:
        """Return the spans so far, of one trace when it is named."""
        with self._lock:
            return [span for span in self._spans if trace in ("", span.trace)]


def _taken(service: str, span: Any) -> TakenSpan:
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    told = tuple(_facts(event.attributes) for event in span.events)
    failed, why = span.status.code == 2, span.status.message
    return TakenSpan(span.name, service, *ids, failed=failed, why=why, facts=_facts(span.attributes), told=told)


def _facts(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in attributes}


class _Service(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector):
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        self._collector.take(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def _http_server(collector: Collector) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            known = self.path == "/v1/traces"
            if known:
                collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextmanager
def otlp_collector() -> Iterator[Collector]:
    """Run a collector on free ports of this machine."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Service(collector), server)
    collector.grpc = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    web = _http_server(collector)
    collector.http = f"http://127.0.0.1:{web.server_address[1]}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        web.shutdown()
        web.server_close()
        server.stop(1).wait()
