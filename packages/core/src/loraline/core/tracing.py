"""Traces by OpenTelemetry, where its own variables ask for them; else nothing of it is imported and nothing is paid.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_TRACES_EXPORTER`) switches traces on; endpoint, protocol, headers, sampler and
resource are OpenTelemetry's variables too. The packages come with the extra `otel`; without them the server says so in
its log and serves untraced. The client has its own few lines of this, for it does not depend on this package.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import structlog

from loraline.core.logging import mask

P = ParamSpec("P")
T = TypeVar("T")
_FLUSH_SECONDS = 5.0
_LONGEST_CARRIER = 4096
_KINDS = ("internal", "server", "client", "producer", "consumer")
_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

_provider: Any = None
_tracer: Any = None  # one for the process, as OpenTelemetry has it
log = structlog.get_logger("loraline.tracing")


class NoSpan:
    """What stands for a span while traces are off."""

    def set_attribute(self, key: str, value: Any) -> None:
        """Do nothing."""

    def update_name(self, name: str) -> None:
        """Do nothing."""

    def fail(self, description: str) -> None:
        """Do nothing."""


class Span:
    """A span of OpenTelemetry, with the one status that is ever set by hand."""

    def __init__(self, span: Any):
        self._span = span

    def set_attribute(self, key: str, value: Any) -> None:
        """Add a fact."""
        self._span.set_attribute(key, value)

    def update_name(self, name: str) -> None:
        """Rename the span: some names are known only at the end."""
        self._span.update_name(name)

    def fail(self, description: str) -> None:
        """Mark the span as failed; the description is told without secrets."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, mask(description)))


_NO_SPAN = NoSpan()


def wanted() -> bool:
    """Tell whether the environment asks for traces."""
    given = os.environ.get
    if given("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = given("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    return bool(given("OTEL_EXPORTER_OTLP_ENDPOINT") or given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def on() -> bool:
    """Tell whether spans are recorded in this process."""
    return _tracer is not None


def configure(service: str) -> None:
    """Begin to record when the environment asks for it; `service` is the name unless OTEL_SERVICE_NAME gives one."""
    global _provider, _tracer  # noqa: PLW0603
    if on() or not wanted():
        return
    try:
        _provider = _make_provider(service)
    except ImportError as error:
        remedy = "pip install 'loraline-core[otel]', or unset the OTEL_ variables"
        log.warning("traces are asked for, but cannot be sent; going on without", missing=str(error), remedy=remedy)
        return
    except Exception as error:  # a wrong variable must not keep a server from serving
        log.warning("traces are asked for, but the OTEL_ variables make no sense; going on without", error=str(error))
        return
    from opentelemetry import trace

    trace.set_tracer_provider(_provider)
    _tracer = _provider.get_tracer("loraline")


@contextmanager
def recording(stages: Sequence[str]) -> Iterator[None]:
    """Record, where asked for, while a server of these stages runs; then send what is left."""
    configure(f"loraline-{stages[0]}" if len(stages) == 1 else "loraline")
    try:
        yield
    finally:
        flush()


def _make_provider(service: str) -> Any:
    from importlib.metadata import entry_points

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    given = os.environ.get
    named = given("OTEL_SERVICE_NAME") or "service.name=" in given("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": service}))
    for name in _exporters():
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise ImportError(f"no package brings the exporter {name}")
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    return provider


def _exporters() -> list[str]:
    """Return the names of the exporters as packages register them; `otlp` by the protocol that is asked for."""
    given = os.environ.get
    names = [name.strip() for name in (given("OTEL_TRACES_EXPORTER") or "otlp").split(",") if name.strip()]
    protocol = given("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or given("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if "otlp" in names and protocol not in _PROTOCOLS:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; there are {' and '.join(_PROTOCOLS)}")
    return [_PROTOCOLS[protocol] if name == "otlp" else name for name in names]


def flush() -> None:
    """Send what is recorded; waits a few seconds at most, for a collector out of reach must hold nothing up."""
    if _provider is None:
        return
    sending = threading.Thread(target=_provider.force_flush, name="traces", daemon=True)
    sending.start()
    sending.join(_FLUSH_SECONDS)


@contextmanager
def span(
    name: str,
    *,
    kind: str = "internal",
    parent: Mapping[str, str] | None = None,
    attributes: Mapping[str, Any] | None = None,
    errors: bool = True,
) -> Iterator[Span | NoSpan]:
    """Record what happens in the block, under the current span or under the one that a carrier names.

    With `errors` an exception marks the span as failed and is told there, without secrets; cancelling is no failure.
    """
    if _tracer is None:
        yield _NO_SPAN
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    context = extract(parent) if parent else None
    settings = {"record_exception": False, "set_status_on_exception": False, "attributes": dict(attributes or {})}
    number = SpanKind(_KINDS.index(kind))
    with _tracer.start_as_current_span(name, context=context, kind=number, **settings) as recorded:
        found = Span(recorded)
        try:
            yield found
        except Exception as error:
            if errors:
                found.fail(f"{type(error).__name__}: {error}")
            raise


def traced(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that records each call of a function as a span."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if _tracer is None:
                return function(*args, **kwargs)
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


def carrier() -> dict[str, str]:
    """Return the current span as the headers that carry it elsewhere; empty when there is none."""
    if _tracer is None:
        return {}
    from opentelemetry.propagate import inject

    found: dict[str, str] = {}
    inject(found)
    return found


def ids() -> dict[str, str]:
    """Return trace_id and span_id of the current span in hex, for log lines; empty when there is none."""
    if _tracer is None:
        return {}
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def to_text(found: Mapping[str, str]) -> str:
    """Return a carrier as text for a database; empty for none, and for one of unreasonable length."""
    text = json.dumps(dict(found)) if found else ""
    return text if len(text) <= _LONGEST_CARRIER else ""


def from_text(text: str) -> dict[str, str]:
    """Read what to_text wrote."""
    return json.loads(text) if text else {}
