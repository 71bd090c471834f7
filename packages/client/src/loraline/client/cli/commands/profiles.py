"""`loraline profiles …`."""

from __future__ import annotations

from loraline.client.cli.app import App, invocation


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Response profiles: named ways to answer, with prompt, shape and language.")
    app.add_typer(group, name="profiles")
    group.command("list")(list_profiles)


def list_profiles() -> None:
    """List the server's response profiles: what they take, and in which language they answer."""
    output = invocation().output
    with invocation().client() as client:
        profiles = client.inference.profiles()
    if output.json:
        output.data(profiles)
        return
    rows = [
        [
            profile.name,
            ", ".join([field.name for field in profile.fields] + (["free text"] if profile.free_text else [])),
            profile.language,
            profile.event,
            profile.description,
        ]
        for profile in profiles
    ]
    output.table(["name", "takes", "language", "event", "description"], rows, empty="There are no profiles.")
