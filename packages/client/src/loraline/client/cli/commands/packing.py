"""`loraline artifacts pack` and `unpack`: artifacts on a disk in a pocket."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.protobuf import json_format

from loraline.client import packs
from loraline.client.cli.app import App, invocation
from loraline.client.cli.output import size_text
from loraline.client.cli.progress import view
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.report import StageOutcome
from loraline.client.refs import format_ref, kind_name


def register(group: App) -> None:
    """Add the commands to the group of artifacts."""
    group.command("pack")(pack)
    group.command("unpack")(unpack)


def pack(
    ref: Annotated[str, typer.Argument(metavar="REF", help="kind/name, kind/name:v3 or kind/name@alias.")],
    file: Annotated[Path | None, typer.Argument(help="New tar file; default: NAME-vN.tar here.")] = None,
) -> None:
    """Write an artifact to one tar file, to carry it to a machine without a network.

    Example:

      loraline models pull Qwen/Qwen2.5-0.5B-Instruct --name qwen
      loraline artifacts pack model/qwen /media/stick/qwen.tar
    """
    output = invocation().output
    with invocation().client() as client, view(output) as shown:
        artifact = client.artifacts.show(ref)
        target = (file or Path(f"{artifact.ref.name}-v{artifact.ref.version}.tar")).absolute()
        packs.refuse_existing(target)
        text = format_ref(artifact.ref)
        shown.started(text, f"to {target}")
        with tempfile.TemporaryDirectory(prefix=".loraline-", dir=target.parent) as room:
            folder = Path(room) / "files"
            client.artifacts.download(artifact.ref, folder, progress=lambda done, all_: shown.sent(text, done, all_))
            packs.pack(artifact, folder, target)
        size = size_text(target.stat().st_size)
        shown.finished(StageOutcome(text, detail=f"{target}, {len(artifact.files)} files verified, {size}"))


def unpack(
    file: Annotated[Path, typer.Argument(help="What `loraline artifacts pack` wrote.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option(help="Name in the store; default: the one it had.")] = "",
) -> None:
    """Publish a packed artifact here; every file is compared with its digest first.

    Example:

      loraline artifacts unpack /media/stick/qwen.tar
    """
    output = invocation().output
    file = file.absolute()
    with view(output) as shown, tempfile.TemporaryDirectory(prefix=".loraline-", dir=file.parent) as room:
        shown.started(file.name, "verifying")
        folder = Path(room) / "files"
        packed = packs.unpack(file, folder)
        with invocation().client() as client:
            upload = client.artifacts.upload(
                folder,
                name or packed.ref.name,
                kind=kind_name(packed.ref.kind),
                facts=json_format.MessageToDict(packed.facts),
                progress=lambda done, all_: shown.sent(file.name, done, all_),
            )
        if upload.artifact.digest != packed.digest:
            message = f"The store made {upload.artifact.digest} of {file}, which was packed as {packed.digest}."
            raise LoralineApiError(grpc.StatusCode.DATA_LOSS, "PACK_DAMAGED", message)
        how = "already done" if upload.unchanged else ""
        shown.finished(StageOutcome(file.name, how, artifact=upload.artifact))
