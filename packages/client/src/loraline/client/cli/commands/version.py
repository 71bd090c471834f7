"""`loraline version`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from loraline.client.cli.app import App, invocation

PACKAGES = (
    "loraline-client",
    "loraline-api",
    "loraline-core",
    "loraline-allinone",
    "loraline-datagen",
    "loraline-trainer",
    "loraline-merger",
    "loraline-inference",
)


def register(app: App) -> None:
    """Add the command."""
    app.command("version")(version)


def version() -> None:
    """Show the versions of Loraline's packages that are installed here."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version_of(package)
        except PackageNotFoundError:
            continue
    output = invocation().output
    if output.json:
        output.data(installed)
    else:
        output.pairs(list(installed.items()))
