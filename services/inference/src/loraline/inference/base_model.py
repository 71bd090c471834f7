"""Base models: from a request or a setting to a local folder with its identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core import hub
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.refs import format_ref, parse_ref
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.core.preflight import Finding
from loraline.core.preflight.model_folder import vocabulary_findings, weight_problems
from loraline.core.server_paths import model_folder


@dataclass(frozen=True)
class LocalBase:
    """A base model on this machine, with what identifies it."""

    spec: BaseModel
    """How it was asked for, with what was resolved: the exact version of an artifact, the commit of a Hub model."""
    folder: Path
    default_name: str
    """Name to serve it under when nobody says another."""
    artifact: ArtifactRef | None
    """The exact artifact; None for paths and the Hub."""
    config_sha256: str
    tokenizer_sha256: str
    """Digest of tokenizer.json; empty without one."""
    doubts: tuple[Finding, ...] = ()
    """What is wrong with the folder and does not keep it from being served."""

    @property
    def digest(self) -> str:
        """Digest of the artifact; empty for paths and the Hub."""
        return self.artifact.digest if self.artifact is not None else ""

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return read_config(self.folder)

    @property
    def described(self) -> str:
        """What people call it."""
        return describe_base(self.spec)


def parse_base(text: str) -> BaseModel:
    """Read the setting: `model/tiny:v1` (an artifact), a folder, or `org/name` and `hub:org/name` (a Hub id)."""
    if text.startswith("hub:"):
        return BaseModel(hub_id=text.removeprefix("hub:"))
    if text.startswith("model/"):
        return BaseModel(artifact=parse_ref(text))
    if text.startswith((".", "/", "~")) or Path(text).expanduser().is_dir():
        return BaseModel(path=str(Path(text).expanduser().absolute()))
    return BaseModel(hub_id=text)


def open_base(spec: BaseModel, library: ArtifactLibrary, settings: CoreSettings, *, trusted: bool) -> LocalBase:
    """Bring a base model to this machine and check that its folder is one. Blocking.

    `trusted`: the operator named it in the settings, so any folder will do; a request may name only folders under
    LORALINE_ALLOWED_PATHS.
    """
    _check_remote_code(spec, settings)
    resolved = BaseModel()
    resolved.CopyFrom(spec)
    source, artifact = spec.WhichOneof("source"), None
    if source == "artifact":
        if spec.artifact.kind != artifact_pb2.ARTIFACT_KIND_MODEL:
            message = f"{format_ref(spec.artifact)} is no model. Name a model artifact such as model/tiny:v1."
            raise invalid_argument("NOT_A_MODEL", message, model__artifact__kind=message)
        artifact = library.resolve(spec.artifact)
        folder, name = library.fetch(artifact), artifact.name
        resolved.artifact.CopyFrom(artifact)
    elif source == "path":
        folder = model_folder(spec.path, None if trusted else settings.allowed_paths, "model.path")
        name = folder.name
    else:
        folder, _ = hub.download(spec.hub_id, spec.revision, code=spec.trust_remote_code)
        name = spec.hub_id.rpartition("/")[2]
        resolved.revision = folder.name
    doubts = _check_complete(folder)
    return LocalBase(
        spec=resolved,
        folder=folder,
        default_name=name.lower(),
        artifact=artifact,
        config_sha256=_digest(folder / "config.json"),
        tokenizer_sha256=_digest(folder / "tokenizer.json"),
        doubts=doubts,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder; FAILED_PRECONDITION MODEL_INCOMPLETE otherwise."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _incomplete(folder, f"config.json cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise _incomplete(folder, "config.json is no JSON object")
    return content


def _check_remote_code(spec: BaseModel, settings: CoreSettings) -> None:
    if not spec.trust_remote_code:
        return
    source = spec.WhichOneof("source")
    name = format_ref(spec.artifact) if source == "artifact" else str(getattr(spec, source or "path"))
    if name not in settings.allow_remote_code:
        message = f"{name} may not run its own code here. An operator can allow it in LORALINE_ALLOW_REMOTE_CODE."
        fields = {"model.trust_remote_code": "is not allowed for this model"}
        raise LoralineError(grpc.StatusCode.PERMISSION_DENIED, "REMOTE_CODE_REFUSED", message, fields=fields)


def _check_complete(folder: Path) -> tuple[Finding, ...]:
    """Return the doubts about a folder. FAILED_PRECONDITION for one that is not whole or whose tokenizer is another's.

    MODEL_INCOMPLETE, VOCAB_SIZE_MISMATCH or TOKEN_ID_OUT_OF_RANGE; a GPU would end in a device-side assert.
    """
    read_config(folder)
    problems = list(weight_problems(folder))
    if problems:
        more = f" ({len(problems) - 3} more)" if len(problems) > 3 else ""
        raise _incomplete(folder, f"{'; '.join(problems[:3])}{more}")
    found = vocabulary_findings(folder)
    for finding in found:
        if finding.level == "failed":
            message = f"{finding.said}. Publish or download it again, with the config and tokenizer of its weights."
            raise failed_precondition(finding.reason, message, folder=str(folder))
    return tuple(found)


def _incomplete(folder: Path, why: str) -> LoralineError:
    message = f"{folder.name} is no complete model folder: {why}. Publish or download it again."
    return failed_precondition("MODEL_INCOMPLETE", message, folder=str(folder))


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_base(spec: BaseModel | None) -> str:
    """Return what a base model is called in messages."""
    if spec is None:
        return "no model"
    source = spec.WhichOneof("source")
    return format_ref(spec.artifact) if source == "artifact" else str(getattr(spec, source or "path"))
