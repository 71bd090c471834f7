"""`loraline adapters …`."""

from __future__ import annotations

from typing import Annotated

import typer

from loraline.api.inference.v1 import inference_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.output import Output, age_text
from loraline.client.pipeline.report import check_proof
from loraline.client.refs import format_ref, parse_ref

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="name, name:v3 or name@alias.")]


def register(app: App) -> None:
    """Add the group."""
    group = App(help="Put adapters into service: loaded, proven, promoted, rolled back.")
    app.add_typer(group, name="adapters")
    group.command("list")(list_adapters)
    group.command("load")(load)
    group.command("unload")(unload)
    group.command("promote")(promote)
    group.command("rollback")(rollback)


def list_adapters() -> None:
    """List what can be asked now: the base and its adapters, with the proof of each."""
    output = invocation().output
    with invocation().client() as client:
        models = client.inference.models()
    if output.json:
        output.data(models)
        return
    rows = [
        [
            model.name,
            "base" if model.kind == inference_pb2.SERVED_KIND_BASE else "adapter",
            format_ref(model.artifact) if model.HasField("artifact") else "",
            ", ".join(model.aliases),
            str(model.lora_rank or ""),
            _proof_word(model),
            age_text(model.load_time),
        ]
        for model in models
    ]
    output.table(["name", "kind", "artifact", "aliases", "rank", "proof", "loaded"], rows, empty="Nothing is served.")


def _proof_word(model: inference_pb2.ServedModel) -> str:
    if not model.HasField("proof"):
        return ""
    return f"{model.proof.mean_abs_diff_from_trainer:.2g} nats of {model.proof.bound:.2g}"


def load(adapter: Adapter) -> None:
    """Load an adapter and prove that it, and not the base, is what answers.

    Example:

      loraline adapters load mareva:v3
    """
    with invocation().client() as client:
        model = client.inference.load_adapter(parse_ref(adapter, default_kind="adapter"))
    _tell(invocation().output, model)


def _tell(output: Output, model: inference_pb2.ServedModel) -> None:
    if output.json:
        output.data(model)
        return
    proof = check_proof(model.proof if model.HasField("proof") else None)
    output.line(f"serving {model.name} ({format_ref(model.artifact)})")
    output.say(f"proof: {proof.figures}")
    output.say(f"ask it: loraline chat --model {model.name}")


def unload(name: Annotated[str, typer.Argument(help="Served name, with version or alias.")]) -> None:
    """Take an adapter out of service."""
    with invocation().client() as client:
        client.inference.unload_adapter(name)
    output = invocation().output
    if output.json:
        output.data({"unloaded": name})
    else:
        output.say(f"{name}: out of service")


def promote(
    adapter: Adapter,
    alias: Annotated[str, typer.Argument(help="Alias to move.")] = "production",
) -> None:
    """Load an adapter, prove it, then move an alias to it in one step.

    Example:

      loraline adapters promote mareva:v3 production
    """
    with invocation().client() as client:
        reply = client.inference.set_alias(parse_ref(adapter, default_kind="adapter"), alias)
    output = invocation().output
    if output.json:
        output.data(reply)
    else:
        _tell(output, reply.model)
        _tell_move(output, reply.model.artifact.name, reply.change.alias, reply)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    alias: Annotated[str, typer.Argument(help="Alias to move back.")] = "production",
) -> None:
    """Move an alias back to where it pointed before."""
    with invocation().client() as client:
        reply = client.inference.rollback(name, alias)
    output = invocation().output
    if output.json:
        output.data(reply)
    else:
        _tell_move(output, name, alias, reply)


def _tell_move(
    output: Output, name: str, alias: str, reply: inference_pb2.SetAliasResponse | inference_pb2.RollbackResponse
) -> None:
    before = f"v{reply.change.from_version}" if reply.change.from_version else "nothing"
    output.line(f"{name}@{alias}: {before} -> v{reply.change.to_version}")
