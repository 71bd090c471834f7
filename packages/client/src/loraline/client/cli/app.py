"""The frame of the command: global options that stand anywhere, and failures that are told."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, cast

import typer

from loraline.client.aio import AsyncLoraline
from loraline.client.cli.failures import CommandFailed, told
from loraline.client.cli.output import Format, Output
from loraline.client.sync import Loraline

_PANEL = "Options of every command"


class FormatChoice(StrEnum):
    """How to write."""

    AUTO = "auto"
    JSON = "json"


Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="HOST:PORT", help="Server to ask; also LORALINE_ADDRESS.", rich_help_panel=_PANEL
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="API key; also LORALINE_API_KEY or the file client.key.",
        rich_help_panel=_PANEL,
    ),
]
Form = Annotated[FormatChoice | None, typer.Option("--format", help="`json` for programs.", rich_help_panel=_PANEL)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.", rich_help_panel=_PANEL)]
GLOBAL_OPTIONS = {"address": Address, "key": Key, "format": Form, "quiet": Quiet}


@dataclass
class Invocation:
    """What the global options say."""

    address: str | None = None
    key: str | None = None
    form: Format = "auto"
    quiet: bool = False

    def take(self, address: str | None, key: str | None, form: FormatChoice | None, quiet: bool) -> None:
        """Take over what was given; what stands nearer to the command wins."""
        self.address = address or self.address
        self.key = key if key is not None else self.key
        self.form = form.value if form is not None else self.form
        self.quiet = quiet or self.quiet

    @functools.cached_property
    def output(self) -> Output:
        """Where this command writes; asked for once all options are read."""
        return Output(self.form, self.quiet)

    @contextmanager
    def client(self) -> Iterator[Loraline]:
        """Connect for the time of a command."""
        with Loraline.connect(self.address, self.key) as client:
            yield client

    def async_client(self) -> AsyncLoraline:
        """Connect from inside an event loop."""
        return AsyncLoraline.connect(self.address, self.key)


_current: ContextVar[Invocation | None] = ContextVar("loraline_invocation", default=None)


def invocation() -> Invocation:
    """Return what the global options of the running command say."""
    current = _current.get()
    if current is None:
        current = Invocation()
        _current.set(current)
    return current


def begin(address: Address = None, key: Key = None, form: Form = None, quiet: Quiet = False) -> None:
    """Start an invocation with the options that stand before the command."""
    _current.set(Invocation())
    invocation().take(address, key, form, quiet)


def _take(address: Address = None, key: Key = None, form: Form = None, quiet: Quiet = False) -> None:
    """Take the options that stand between a group and its command."""
    invocation().take(address, key, form, quiet)


class App(typer.Typer):
    """A Typer app whose commands take the global options and tell failures."""

    def __init__(self, **settings: Any):
        super().__init__(
            no_args_is_help=True,
            rich_markup_mode="rich",
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )
        self.callback()(_take)

    def command(  # type: ignore[override] - the settings are Typer's
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a command; a LoralineApiError ends it with an error block and its exit code."""
        register = super().command(name, **settings)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_framed(function))
            return function

        return decorate


def _framed(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def run(**given: Any) -> Any:
        options = {name: given.pop(name) for name in GLOBAL_OPTIONS}
        invocation().take(options["address"], options["key"], options["format"], options["quiet"])
        try:
            with told(invocation().output):
                return function(**given)
        except CommandFailed as failure:
            raise typer.Exit(failure.exit_code) from None

    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=False if name == "quiet" else None,
        )
        for name, annotation in GLOBAL_OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *more]
    target = cast(Any, run)
    target.__signature__ = signature.replace(parameters=parameters)
    target.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
