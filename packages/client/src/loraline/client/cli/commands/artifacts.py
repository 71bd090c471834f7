"""`loraline artifacts …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraline.api.artifact.v1 import artifact_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.commands import packing
from loraline.client.cli.output import Output, age_text, size_text
from loraline.client.cli.plaindata import as_data, flat
from loraline.client.cli.progress import view
from loraline.client.pipeline.report import StageOutcome
from loraline.client.refs import format_ref, parse_ref

Ref = Annotated[str, typer.Argument(metavar="REF", help="kind/name, kind/name:v3 or kind/name@alias.")]


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Look at what was made, fetch it, publish folders, move aliases.")
    app.add_typer(group, name="artifacts")
    group.command("list")(list_artifacts)
    group.command("show")(show)
    group.command("pull")(pull)
    group.command("push")(push)
    packing.register(group)
    group.command("alias")(alias)
    group.command("verify")(verify)
    group.command("delete")(delete)


def list_artifacts(
    name: Annotated[str, typer.Argument(help="Only this name, or kind/name.")] = "",
    kind: Annotated[str, typer.Option(help="Only source, dataset, adapter, model, checkpoint or report.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many, newest first; 0 for all.")] = 20,
) -> None:
    """List artifacts, newest first.

    Examples:

      loraline artifacts list --kind adapter
      loraline artifacts list adapter/mareva
    """
    if "/" in name:
        kind, _, name = name.partition("/")
    output = invocation().output
    with invocation().client() as client:
        found = client.artifacts.list(kind=kind, name=name, limit=limit)
    if output.json:
        output.data(found)
    else:
        write_table(output, found)


def write_table(output: Output, found: list[artifact_pb2.Artifact]) -> None:
    """Write artifacts as a table."""
    rows = [
        [
            format_ref(artifact.ref),
            ", ".join(artifact.aliases),
            size_text(artifact.size_bytes),
            age_text(artifact.create_time),
            artifact.job or "uploaded",
        ]
        for artifact in found
    ]
    output.table(["artifact", "aliases", "size", "created", "made by"], rows, empty="No artifacts.")


def show(ref: Ref) -> None:
    """Show one artifact: files, lineage, settings, facts and where it lies."""
    with invocation().client() as client:
        artifact = client.artifacts.show(ref)
    output = invocation().output
    if output.json:
        output.data(artifact)
        return
    facts, settings = as_data(artifact.facts), as_data(artifact.settings)
    output.pairs(
        [
            ("artifact", format_ref(artifact.ref)),
            ("aliases", ", ".join(artifact.aliases)),
            ("digest", artifact.digest),
            ("size", size_text(artifact.size_bytes)),
            ("created", age_text(artifact.create_time)),
            ("made by", artifact.job or "uploaded"),
            ("made from", "\n".join(format_ref(source) for source in artifact.inputs)),
            ("lies at", artifact.location),
            ("facts", "\n".join(f"{name}: {value}" for name, value in flat(facts))),
            ("settings", "\n".join(f"{name}: {value}" for name, value in flat(settings))),
        ]
    )
    output.line("")
    output.table(["file", "size", "sha256"], [[f.path, size_text(f.size_bytes), f.sha256[:12]] for f in artifact.files])


def pull(
    ref: Ref,
    folder: Annotated[Path | None, typer.Argument(help="New folder for the files; default: NAME-vN here.")] = None,
) -> None:
    """Fetch an artifact into a new folder; every file is verified before the folder appears.

    Example:

      loraline artifacts pull adapter/mareva@production ./mareva
    """
    output = invocation().output
    with invocation().client() as client, view(output) as shown:
        artifact = client.artifacts.show(ref)
        target = folder or Path(f"{artifact.ref.name}-v{artifact.ref.version}")
        text = format_ref(artifact.ref)
        shown.started(text, f"to {target}")
        client.artifacts.download(artifact.ref, target, progress=lambda done, total: shown.sent(text, done, total))
        shown.finished(StageOutcome(text, detail=f"{target}, {len(artifact.files)} files verified"))


def push(
    folder: Annotated[Path, typer.Argument(help="Folder (or file) to publish.")],
    ref: Annotated[str, typer.Argument(metavar="REF", help="kind/name of the new version; a bare name is a source.")],
) -> None:
    """Publish a folder as a new version; equal content stores nothing.

    Examples:

      loraline artifacts push raw/ mareva-raw
      loraline artifacts push my-adapter/ adapter/mareva
    """
    target = parse_ref(ref, default_kind="source")
    kind = format_ref(target).partition("/")[0]
    output = invocation().output
    with invocation().client() as client, view(output) as shown:
        shown.started(ref, f"from {folder}")
        upload = client.artifacts.upload(
            folder, target.name, kind=kind, progress=lambda done, total: shown.sent(ref, done, total)
        )
        if upload.skipped:
            shown.remark(ref, f"left out {len(upload.skipped)} hidden files: {', '.join(upload.skipped[:3])}")
        how = "already done" if upload.unchanged else ""
        shown.finished(StageOutcome(ref, how, artifact=upload.artifact))


def alias(
    ref: Ref,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as `production`; empty shows the history.")] = "",
    remove: Annotated[bool, typer.Option("--delete", help="Remove the alias instead.")] = False,
) -> None:
    """Point an alias at a version, remove one, or show how aliases moved.

    Adapters in service are better moved with `loraline adapters promote`, which proves them first.

    Examples:

      loraline artifacts alias adapter/mareva:v3 production
      loraline artifacts alias adapter/mareva
    """
    output = invocation().output
    with invocation().client() as client:
        if not name:
            changes = client.artifacts.alias_changes(ref)
        elif remove:
            changes = [client.artifacts.delete_alias(ref, name)]
        else:
            changes = [client.artifacts.set_alias(ref, name)]
    if output.json:
        output.data(changes)
        return
    rows = [
        [
            entry.alias,
            f"v{entry.from_version}" if entry.from_version else "-",
            f"v{entry.to_version}" if entry.to_version else "removed",
            age_text(entry.time),
            entry.actor,
        ]
        for entry in changes
    ]
    output.table(["alias", "from", "to", "when", "by"], rows, empty="No alias was ever set.")


def verify(ref: Ref) -> None:
    """Have the server read every file again and compare it with the manifest."""
    with invocation().client() as client:
        reply = client.artifacts.verify(ref)
    output = invocation().output
    if output.json:
        output.data(reply)
    else:
        output.line(f"{format_ref(reply.artifact.ref)}: {size_text(reply.verified_bytes)} verified")


def delete(
    ref: Ref,
    force: Annotated[bool, typer.Option("--force", help="Although other artifacts were made from it.")] = False,
) -> None:
    """Delete one version; name it exactly (kind/name:vN).

    Refused while an alias points at it, a server serves it, a job reads it, or others were made from it.
    """
    with invocation().client() as client:
        client.artifacts.delete(ref, force=force)
    output = invocation().output
    if output.json:
        output.data({"deleted": ref})
    else:
        output.say(f"{ref}: deleted")
