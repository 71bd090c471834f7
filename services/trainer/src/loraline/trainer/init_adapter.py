"""An adapter that a run starts from: its settings become the run's, and its base must be the run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.trainer.base_models import ResolvedBase

CONFIG = "adapter_config.json"
_RECORD = "base_model.json"


def with_start(request: pb.TrainRequest, library: ArtifactLibrary) -> pb.TrainRequest:
    """Return the request with the exact adapter that it starts from and that adapter's settings; blocking.

    A request that starts with a fresh adapter comes back as it is.
    """
    if not request.HasField("init_adapter"):
        return request
    if request.init_adapter.kind != ARTIFACT_KIND_ADAPTER:
        raise invalid_argument("NOT_AN_ADAPTER", "init_adapter must be an adapter.", init_adapter="kind")
    exact = library.resolve(request.init_adapter)
    filled = with_its_settings(request, adapter_settings(library.fetch(exact, paths=[CONFIG])))
    filled.init_adapter.CopyFrom(exact)
    return filled


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json. FAILED_PRECONDITION (INIT_ADAPTER_UNREADABLE) when it is none."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if str(content["peft_type"]) != "LORA" or int(content["r"]) < 1:
            raise ValueError(f"it is of the kind {content['peft_type']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"init_adapter is no LoRA adapter to go on from: {CONFIG} cannot be used ({error})."
        raise failed_precondition("INIT_ADAPTER_UNREADABLE", message) from error
    return content


def with_its_settings(request: pb.TrainRequest, settings: dict[str, Any]) -> pb.TrainRequest:
    """Return the request with rank, alpha, modules, scaling and kind of the adapter that it starts from.

    Raises INVALID_ARGUMENT (INIT_ADAPTER_DIFFERS) that names the fields where the request asks for something else.
    """
    if request.existing_run == pb.EXISTING_RUN_POLICY_CONTINUE:
        text = "does not go with existing_run CONTINUE, which starts from the run's own checkpoint"
        raise invalid_argument("INIT_ADAPTER_DIFFERS", f"init_adapter {text}. Leave one out.", init_adapter=text)
    filled = pb.TrainRequest()
    filled.CopyFrom(request)
    lora = filled.parameters.lora
    modules = settings.get("target_modules") or []
    own = {
        "r": int(settings["r"]),
        "alpha": float(settings.get("lora_alpha") or 0),
        "rslora": bool(settings.get("use_rslora")),
        "target_modules": sorted([modules] if isinstance(modules, str) else modules),
        "modules_to_save": sorted(settings.get("modules_to_save") or []),
    }
    problems: dict[str, str] = {}
    for name, value in own.items():
        asked = getattr(lora, name)
        asked = sorted(asked) if isinstance(value, list) else asked
        if asked and asked != value and not _same_modules(name, asked, value):
            problems[f"parameters.lora.{name}"] = f"is {asked}, the adapter has {value}"
    kind = pb.METHOD_DORA if settings.get("use_dora") else pb.METHOD_LORA
    if request.method not in (pb.METHOD_UNSPECIFIED, kind):
        asked_kind, own_kind = pb.Method.Name(request.method), pb.Method.Name(kind)
        problems["method"] = f"is {asked_kind}, the adapter is {own_kind}"
    if problems:
        listed = "; ".join(f"{name} {problem}" for name, problem in problems.items())
        message = f"init_adapter cannot be trained on with other settings: {listed}. Leave those fields out."
        error = invalid_argument("INIT_ADAPTER_DIFFERS", message)
        error.fields = problems
        raise error
    filled.method = kind
    lora.r, lora.alpha, lora.rslora = own["r"], own["alpha"], own["rslora"]
    for name in ("target_modules", "modules_to_save"):
        lora.ClearField(name)
        getattr(lora, name).extend(own[name])
    return filled


def _same_modules(name: str, asked: list[str], own: list[str]) -> bool:
    """peft writes whole module paths for small models where the request had their last names."""
    return name == "target_modules" and {path.rpartition(".")[2] for path in own} == set(asked)


def check_base(folder: Path, base: ResolvedBase) -> None:
    """Check that the adapter belongs to the run's base, by the record that training left in it.

    Raises FAILED_PRECONDITION: INIT_ADAPTER_OF_ANOTHER_BASE, or INIT_ADAPTER_UNREADABLE without a record.
    """
    try:
        theirs = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        ours = base.record()
        differs = [name for name in ("config_sha256", "tokenizer_sha256") if theirs.get(name, "") != ours[name]]
        if theirs.get("digest") and ours.get("digest") and theirs["digest"] != ours["digest"]:
            differs.append("digest")
    except (OSError, ValueError, AttributeError) as error:
        message = f"init_adapter does not say which base it belongs to: {_RECORD} cannot be read ({error})."
        raise failed_precondition("INIT_ADAPTER_UNREADABLE", message) from error
    if differs:
        raise _another_base(theirs, base, differs)


def _another_base(theirs: dict[str, Any], base: ResolvedBase, differs: list[str]) -> LoralineError:
    name = theirs.get("ref") or theirs.get("hub_id") or theirs.get("path") or "another model"
    message = (
        f"init_adapter was trained on {name}, not on {base.label} ({', '.join(differs)} differ). Train on its own "
        "base, or start with a fresh adapter."
    )
    return failed_precondition("INIT_ADAPTER_OF_ANOTHER_BASE", message)
