"""Logs: structlog for our own lines, the same look for those of libraries, and no secret in any of them."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

import structlog

from loraline.core.call import current_call

_SECRETS = (
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{6,}"), r"\1***"),
    (re.compile(r"\blora_([0-9A-Za-z]+)_[0-9A-Za-z]{8,}"), r"lora_\1_***"),
    (re.compile(r"\b(sk-(?:[a-z]+-)*)[\w-]{8,}"), r"\1***"),
    (re.compile(r"\b(hf_|AIza|ghp_)[\w-]{12,}"), r"\1***"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)"), r"\1***"),
    (
        re.compile(
            r"(?i)(\b\w*(?:api[_-]?key|secret[_-]?key|password|passwd|access[_-]?token)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]{3,}"
        ),
        r"\1***",
    ),
)
_SECRET_FIELDS = re.compile(r"(?i)(password|passwd|secret|api_?key|authorization|^token$|access_token)")
_QUIET = ("alembic", "uvicorn.access", "asyncio", "httpx", "httpcore", "urllib3")

Event = MutableMapping[str, Any]


def mask(text: str) -> str:
    """Return the text with keys, tokens and passwords replaced by `***`."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: "***" if _is_secret(key, item) else _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_masked(item) for item in value) if not hasattr(value, "_fields") else mask(repr(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    text = repr(value)
    clean = mask(text)
    return value if clean == text else clean


def _is_secret(name: object, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(value) and bool(_SECRET_FIELDS.search(name))


def mask_secrets(_logger: object, _method: str, event: Event) -> Event:
    """Mask every value of a log line; a structlog processor, to run after tracebacks became text."""
    for name, value in list(event.items()):
        if not name.startswith("_"):
            event[name] = "***" if _is_secret(name, value) else _masked(value)
    return event


def add_call(_logger: object, _method: str, event: Event) -> Event:
    """Add the ids of the call that is being served and of the current span; a structlog processor."""
    from loraline.core import tracing  # which needs mask

    call = current_call()
    if call is not None:
        for name, value in call.facts().items():
            event.setdefault(name, value)
    for name, value in tracing.ids().items():
        event.setdefault(name, value)
    return event


def configure(log_format: Literal["auto", "json", "pretty"] = "auto", level: str = "info") -> None:
    """Set up logging for this process: lines go to standard error; calling it again replaces the set-up."""
    pretty = log_format == "pretty" or (log_format == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if pretty
        else structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    )
    structlog.configure(
        processors=[*_shared(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(renderer))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(getattr(logging, level.upper(), logging.INFO))
    logging.captureWarnings(True)  # Python's warnings are lines like all others
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def configure_job(level: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """Set up logging of a job's process: all lines go to its own log, for people to read.

    Lines of our own, and warnings and errors of libraries, are told too: the service's log has them beside its own.
    """
    configure("pretty", level)
    logging.getLogger().addHandler(_Teller(tell))


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[dict[str, Any]], None]):
        super().__init__()
        self._tell = tell
        self.setFormatter(_formatter(structlog.processors.JSONRenderer(ensure_ascii=False, default=str)))

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a line."""
        if record.levelno < logging.WARNING and record.name.partition(".")[0] != "loraline":
            return
        try:
            fields = json.loads(self.format(record))
            fields.pop("timestamp", None)  # the service's clock is as good
            self._tell(fields)
        except Exception:
            self.handleError(record)


def _shared() -> list[Any]:
    return [
        structlog.contextvars.merge_contextvars,
        add_call,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        mask_secrets,
    ]


def _plain(_logger: object, _method: str, event: Event) -> Event:
    event.pop("color_message", None)  # uvicorn's text once more, for terminals
    return event


def _formatter(renderer: Any) -> structlog.stdlib.ProcessorFormatter:
    # A library's arguments are put into its text before masking, so nothing slips through as an argument.
    foreign = [structlog.stdlib.ExtraAdder(), structlog.stdlib.PositionalArgumentsFormatter(), _plain, *_shared()]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=foreign,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
