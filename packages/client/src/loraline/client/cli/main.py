"""The command `loraline`: entry point, command groups, and commands of other packages."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points

import typer

from loraline.client.cli.app import App, begin, invocation
from loraline.client.cli.commands import (
    adapters,
    artifacts,
    chat,
    datasets,
    jobs,
    models,
    pipelines,
    profiles,
    runs,
    version,
)
from loraline.client.cli.failures import INTERRUPTED

HELP = """From raw text to a served, proven LoRA adapter.

[bold]A first hour[/bold]

  loraline up                                   start a server here
  loraline run examples/persona/pipeline.yaml   from text to service
  loraline chat -m mareva@production            talk to what you made
  loraline jobs list                            what runs and what ran
  loraline artifacts list                       what was made

Every command explains itself with --help and writes JSON with --format json.
Exit codes: 0 fine, 1 a job or its evidence failed, 2 wrong input, 3 no server answers, 4 not allowed.
"""
PLUGIN_GROUP = "loraline.commands"
_INSTALL = {"up": "loraline-allinone", "keys": "loraline-core", "doctor": "loraline-core"}


def build() -> typer.Typer:
    """Return the whole command, with those that other installed packages add."""
    app = App(help=HELP, add_completion=True)
    app.callback()(begin)
    for module in (pipelines, jobs, runs, artifacts, datasets, models, adapters, chat, profiles, version):
        module.register(app)
    found = {point.name: point for point in entry_points(group=PLUGIN_GROUP)}
    for name, package in _INSTALL.items():
        if name not in found:
            _explain_missing(app, name, f"`loraline {name}` comes with another package: pip install {package}")
    for point in found.values():
        _add(app, point)
    return app


def _add(app: App, point: EntryPoint) -> None:
    """Load a command of another package; one that cannot be loaded says why when it is used."""
    own = typer.Typer()
    try:
        point.load()(own)
    except Exception as error:
        if os.environ.get("LORALINE_DEBUG") == "1":
            raise
        _explain_missing(app, point.name, f"`loraline {point.name}` cannot be loaded from {point.value}: {error}")
    else:
        app.add_typer(own)


def _explain_missing(app: App, name: str, message: str) -> None:
    def explain(_: typer.Context) -> None:
        invocation().output.err.print(f"error: {message}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    typer.Typer.command(app, name, context_settings=settings, help=f"Not available here: {message}.")(explain)


def main() -> None:
    """Run the command; what a reader of a pipe leaves unread is no failure."""
    if sys.argv[1:] == ["--version"]:
        sys.argv[1:] = ["version"]
    try:
        build()()
    except BrokenPipeError:
        # Standard output is gone; Python would complain once more when it flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
