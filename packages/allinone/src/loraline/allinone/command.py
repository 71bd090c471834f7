"""`loraline up`: all four stages in one process, in the foreground."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from loraline.allinone.stages import STAGES, builders

HELP = """Start all four stages in this process, with a local folder and SQLite, and nothing else installed.

Stays in the foreground; Ctrl-C lets running jobs write a checkpoint, hands them back and stops. The next start goes on
with them, and serves the models and adapters that were served last.

Examples:

    loraline up
    loraline up --data-dir /data/loraline --listen 127.0.0.1:7700
    loraline up --stage datagen --stage trainer
"""


def register(app: typer.Typer) -> None:
    """Add the command to the `loraline` command line."""
    app.command("up", help=HELP)(up)


def up(
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept. Default: ~/.loraline")] = None,
    listen: Annotated[str, typer.Option(help="host:port of gRPC.")] = "",
    http_listen: Annotated[str, typer.Option(help="host:port of the OpenAI-compatible HTTP API.")] = "",
    metrics_listen: Annotated[str, typer.Option(help="host:port of /metrics and /healthz.")] = "",
    stage: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(STAGES)}. Repeatable.")] = None,
    reflection: Annotated[bool, typer.Option(help="Offer gRPC server reflection, for grpcurl and friends.")] = True,
) -> None:
    """Translate the options into settings and serve."""
    unknown = [name for name in stage or [] if name not in STAGES]
    if unknown:
        raise typer.BadParameter(
            f"no stage is called {unknown[0]!r}; there are {', '.join(STAGES)}", param_hint="--stage"
        )
    for option, address in (("--listen", listen), ("--http-listen", http_listen), ("--metrics-listen", metrics_listen)):
        _check_address(option, address)
    given = {
        "LORALINE_DATA_DIR": str(data_dir) if data_dir else "",
        "LORALINE_LISTEN": listen,
        "LORALINE_INFERENCE_HTTP_LISTEN": http_listen,
        "LORALINE_METRICS_LISTEN": metrics_listen,
    }
    # Settings come from the environment in every deployment; job processes and the engine inherit it.
    os.environ.update({name: value for name, value in given.items() if value})
    if "LORALINE_REFLECTION" not in os.environ:
        os.environ["LORALINE_REFLECTION"] = str(reflection).lower()

    from loraline.core.serving.server import run

    run(builders(stage or ()))


def _check_address(option: str, address: str) -> None:
    """Refuse what is no address before anything is opened or written."""
    if not address:
        return
    from loraline.core.errors import LoralineError
    from loraline.core.serving.addresses import split_address

    try:
        split_address(address, option)
    except LoralineError as error:
        raise typer.BadParameter(error.message, param_hint=option) from error
