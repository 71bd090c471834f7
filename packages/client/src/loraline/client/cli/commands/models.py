"""`loraline models …`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.commands.artifacts import write_table
from loraline.client.cli.commands.jobs import follow
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.plan import describe_base
from loraline.client.refs import parse_ref

_REF = re.compile(r"model/[a-z0-9][a-z0-9._-]*([:@].+)?")


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Bring base models into the store, make a toy one, serve one.")
    app.add_typer(group, name="models")
    group.command("list")(list_models)
    group.command("pull")(pull)
    group.command("tiny")(tiny)
    group.command("load")(load)


def base_model(text: str, revision: str = "") -> trainer_pb2.BaseModel:
    """Return the base model that a text means: model/name, a folder on the server, or a Hub id."""
    if _REF.fullmatch(text):
        return trainer_pb2.BaseModel(artifact=parse_ref(text))
    if text.startswith(("/", "./", "~")):
        return trainer_pb2.BaseModel(path=text)
    return trainer_pb2.BaseModel(hub_id=text, revision=revision)


def list_models(limit: Annotated[int, typer.Option(min=0, help="At most so many; 0 for all.")] = 20) -> None:
    """List the models in the store, newest first, and say which one is served."""
    output = invocation().output
    with invocation().client() as client:
        found = client.artifacts.list(kind="model", limit=limit)
        try:
            base = client.inference.capabilities().base
        except LoralineApiError as error:
            base = None
            served = f"the engine does not say what it serves: {error.message}"
        else:
            served = f"served now: {base.name}" if base.name else "no model is served"
    if output.json:
        output.data(found)
    else:
        write_table(output, found)
        output.say(served)


def pull(
    source: Annotated[str, typer.Argument(help="Hub id (org/name), or a folder on the server.")],
    name: Annotated[str, typer.Option(help="Name in the store; default: the last part of the source.")] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a Hub model.")] = "",
) -> None:
    """Bring a base model into the store, so that later runs need no Hub.

    Example:

      loraline models pull Qwen/Qwen2.5-0.5B-Instruct --name qwen-0.5b
    """
    short = re.sub(r"[^a-z0-9._-]", "-", source.rstrip("/").rpartition("/")[2].lower())[:64]
    request = trainer_pb2.ImportModelRequest(name=name or short, source=base_model(source, revision))
    output = invocation().output
    with invocation().client() as client:
        follow(client, output, client.trainer.import_model(request).name)


def tiny(
    name: Annotated[str, typer.Option(help="Name in the store.")] = "tiny",
    texts: Annotated[
        list[str] | None, typer.Option(help="Dataset or source to learn the tokenizer from; give it several times.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Pretraining steps; 0 means 200.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Make a toy base model (about 4 million parameters), for machines without a Hub.

    Example:

      loraline models tiny --texts source/mareva-raw
    """
    refs = [parse_ref(text, default_kind="source") for text in texts or []]
    request = trainer_pb2.CreateTinyModelRequest(name=name, tokenizer_texts=refs, steps=steps, seed=seed)
    with invocation().client() as client:
        follow(client, invocation().output, client.trainer.create_tiny_model(request).name)


def load(
    model: Annotated[str, typer.Argument(help="model/name[:vN], a Hub id, or a folder on the server.")],
    served_name: Annotated[str, typer.Option(help="Name to serve it under.")] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a Hub model.")] = "",
) -> None:
    """Serve another base model; requests in flight finish first.

    Examples:

      loraline models load model/tiny
      loraline models load model/mareva:v1
    """
    base, output = base_model(model, revision), invocation().output
    with invocation().client() as client:
        output.say(f"loading {describe_base(base)} …")
        served = client.inference.load_model(base, served_name)
    if output.json:
        output.data(served)
    else:
        output.line(f"served as {served.name}")
