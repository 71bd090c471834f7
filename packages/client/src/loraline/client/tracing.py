"""Traces: calls carry the caller's span along, and the command records its own where OpenTelemetry's variables ask.

In a program of yours that has OpenTelemetry at work, its current span becomes the parent of what the servers do.
Without it, `TRACEPARENT` and `TRACESTATE` of the environment are passed on as they are, as batch systems set them. Else
nothing of this is imported or sent. (The servers have a module of the same kind; the client depends on the contract
alone.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_FLUSH_MILLISECONDS = 5000


def headers() -> tuple[tuple[str, str], ...]:
    """Return the metadata that make a call part of the current trace; empty when there is none."""
    found: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(found)
    if not found:
        given = {name: os.environ.get(name.upper(), "") for name in ("traceparent", "tracestate")}
        found = {name: text for name, text in given.items() if text and given["traceparent"]}
    return tuple(found.items())


@contextmanager
def span(name: str, **attributes: str) -> Iterator[None]:
    """Record what happens in the block, where the program records anything.

    Of an exception the span tells the type alone: its text may hold what callers keep to themselves.
    """
    if "opentelemetry.trace" not in sys.modules:
        yield
        return
    from opentelemetry import trace

    tracer = trace.get_tracer("loraline")
    with tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as recorded:
        try:
            yield
        except Exception as error:
            recorded.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            raise


@contextmanager
def recording(service: str = "loraline-cli") -> Iterator[str]:
    """Record during the block when the environment asks for it; yield what is wrong with that, empty for nothing."""
    if not _wanted():
        yield ""
        return
    try:
        provider = _make_provider(service)
    except ImportError as error:
        yield f"traces are asked for, but cannot be sent: {error}. pip install 'loraline-client[otel]'"
        return
    except Exception as error:  # a wrong variable must not keep a pipeline from running
        yield f"traces are asked for, but the OTEL_ variables make no sense: {error}"
        return
    try:
        yield ""
    finally:
        provider.force_flush(_FLUSH_MILLISECONDS)


def _wanted() -> bool:
    given = os.environ.get
    if given("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = given("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    return bool(given("OTEL_EXPORTER_OTLP_ENDPOINT") or given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def _make_provider(service: str) -> Any:
    from importlib.metadata import entry_points

    from opentelemetry import context, propagate, trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    given = os.environ.get
    named = given("OTEL_SERVICE_NAME") or "service.name=" in given("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": service}))
    protocol = given("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or given("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    for name in (part.strip() for part in (given("OTEL_TRACES_EXPORTER") or "otlp").split(",")):
        wanted = _PROTOCOLS[protocol] if name == "otlp" else name
        found = list(entry_points(group="opentelemetry_traces_exporter", name=wanted))
        if not found:
            raise ImportError(f"no package brings the exporter {wanted}")
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    trace.set_tracer_provider(provider)
    # A batch system's span, where there is one, is the parent of ours.
    outer = {name: given(name.upper(), "") for name in ("traceparent", "tracestate")}
    if outer["traceparent"]:
        context.attach(propagate.extract(outer))
    return provider
