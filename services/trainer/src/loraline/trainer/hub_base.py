"""What is known of a Hub model before it is fetched: files, size, shape. Bounded in time; no weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core import hub
from loraline.core.errors import LoralineError, failed_precondition, resource_exhausted
from loraline.core.hub_cache import INDEX, SINGLE, TOKENIZERS, CacheLook


@dataclass(frozen=True)
class HubBase:
    """A Hub model seen from this machine."""

    folder: Path | None
    """Its folder where it is complete in the cache."""
    config: Mapping[str, Any]
    """Content of config.json."""
    weights_bytes: int
    message: str
    """Where it is, and what would have to be fetched."""


def check(model: pb.BaseModel, *, timeout: float) -> None:
    """Refuse a Hub model that a job could not get; does nothing where nothing here speaks to a Hub.

    Asks the Hub only where the cache does not have the model. Raises as `hub.download` does.
    """
    try:
        found = hub.cached(model.hub_id, model.revision, code=model.trust_remote_code)
    except LoralineError as error:
        if error.reason == "ENGINE_NOT_INSTALLED":
            return
        raise
    refusal = hub.forbidden(model.hub_id, model.revision, found)
    if refusal is not None:
        raise refusal
    if not found.complete:
        hub.ask(model.hub_id, model.revision, timeout=timeout)


def see(model: pb.BaseModel, *, timeout: float) -> HubBase:
    """Look at a Hub model, in the cache or on the Hub.

    Raises as `hub.download` does, and MODEL_INCOMPLETE, MODEL_SHARDS_MISSING or MODEL_NOT_SAFETENSORS for a repository
    that could not be trained on.
    """
    found = hub.cached(model.hub_id, model.revision, code=model.trust_remote_code)
    refusal = hub.forbidden(model.hub_id, model.revision, found)
    if refusal is not None:
        raise refusal
    if found.folder is not None and found.complete:
        size = sum((found.folder / name).stat().st_size for name in found.present if name.endswith(".safetensors"))
        config = _read(found.folder / "config.json", model.hub_id)
        return HubBase(found.folder, config, size, f"{model.hub_id} at {found.commit[:12]}: {found.described}")
    return _remote(model, found, timeout)


def _remote(model: pb.BaseModel, found: CacheLook, timeout: float) -> HubBase:
    remote = hub.ask(model.hub_id, model.revision, timeout=timeout)
    config = {}
    if "config.json" in remote.sizes:
        config = _read(hub.fetch_file(model.hub_id, remote.commit, "config.json", timeout=timeout), model.hub_id)
    weights = _weights(model.hub_id, remote, timeout)
    size = sum(remote.sizes[name] for name in weights)
    here = set(found.present) if found.commit == remote.commit else set()
    left = sum(remote.sizes[name] for name in weights if name not in here)
    _refuse_full_disk(model.hub_id, left, found.root)
    state = f"; {found.described}" if here else ""
    message = f"{model.hub_id} at {remote.commit[:12]}: {left / 1e9:.2f} GB of weights to fetch{state}"
    return HubBase(None, config, size, message)


def _weights(hub_id: str, remote: hub.Remote, timeout: float) -> list[str]:
    """Return the weight files by name; refuse a repository that lacks what a model needs."""
    names = remote.sizes
    if "config.json" not in names or not any(name in names for name in TOKENIZERS):
        lacks = "config.json" if "config.json" not in names else "tokenizer"
        message = f"{hub_id} has no {lacks} on the Hub: it is no complete model. Take the repository it was made from."
        raise failed_precondition("MODEL_INCOMPLETE", message)
    if INDEX not in names:
        if SINGLE in names:
            return [SINGLE]
        other = ", ".join(sorted(name for name in names if name.endswith((".bin", ".gguf", ".pt", ".pth")))[:3])
        message = (
            f"{hub_id} has no {SINGLE} and no {INDEX} on the Hub"
            + (f", only {other}" if other else "")
            + ". Take a revision or a conversion with safetensors weights."
        )
        raise failed_precondition("MODEL_NOT_SAFETENSORS" if other else "MODEL_INCOMPLETE", message)
    index = _read(hub.fetch_file(hub_id, remote.commit, INDEX, timeout=timeout), hub_id)
    weight_map = index.get("weight_map")
    shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    missing = [name for name in shards if name not in names]
    if missing or not shards:
        message = (
            f"{hub_id} lacks {len(missing)} of {len(shards)} weight files on the Hub: {', '.join(missing[:5])}. Take "
            "another revision."
        )
        raise failed_precondition("MODEL_SHARDS_MISSING", message, files=",".join(missing[:20]))
    return shards


def _refuse_full_disk(hub_id: str, left: int, root: Path) -> None:
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if left > free:
        message = (
            f"{hub_id} needs {left / 1e9:.1f} GB in {root}, where {free / 1e9:.1f} GB are free. Make room, or set "
            "HF_HUB_CACHE to a larger disk."
        )
        raise resource_exhausted("DISK_FULL", message)


def _read(file: Path, hub_id: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{hub_id}: {file.name} cannot be read ({error}). Fetch it again."
        raise failed_precondition("MODEL_INCOMPLETE", message) from error
    return content if isinstance(content, dict) else {}
