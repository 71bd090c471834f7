"""Where the base of a merge comes from: an artifact, a folder on the server, the Hub. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core import hub
from loraline.core.artifacts.refs import format_ref, parse_ref
from loraline.core.errors import failed_precondition
from loraline.core.server_paths import model_folder
from loraline.merger.adapter import BASE_FILE, Adapter


@dataclass(frozen=True)
class BaseSource:
    """A base model by name. Exactly one of artifact, path and hub_id is set."""

    artifact: ArtifactRef | None = None
    path: str = ""
    hub_id: str = ""
    revision: str = ""

    @property
    def label(self) -> str:
        """How people would name it."""
        if self.artifact is not None:
            return format_ref(self.artifact)
        return self.path or (f"{self.hub_id}@{self.revision}" if self.revision else self.hub_id)


@dataclass(frozen=True)
class BaseFolder:
    """A base model on this machine; `digest` only for artifacts."""

    source: BaseSource
    folder: Path
    digest: str = ""


def recorded_base(adapter: Adapter, name: str) -> BaseSource:
    """Return the base that an adapter says it was trained on; FAILED_PRECONDITION BASE_UNKNOWN when it does not say."""
    recorded = adapter.recorded_base
    source = recorded.get("source")
    if source == "artifact" and recorded.get("ref"):
        ref = parse_ref(str(recorded["ref"]))
        ref.digest = str(recorded.get("digest") or "")
        return BaseSource(artifact=ref)
    if source == "path" and recorded.get("path"):
        return BaseSource(path=str(recorded["path"]))
    if source == "hub" and recorded.get("hub_id"):
        return BaseSource(hub_id=str(recorded["hub_id"]), revision=str(recorded.get("revision") or ""))
    raise failed_precondition(
        "BASE_UNKNOWN",
        f"{name} does not say which base it was trained on ({BASE_FILE} is missing or empty). Set base_model.",
    )


def bring_base(
    source: BaseSource, *, fetch: Callable[[ArtifactRef], Path], allowed: Sequence[Path], workdir: Path
) -> BaseFolder:
    """Bring a base to this machine; `fetch` gets an exact reference and returns a verified folder."""
    if source.artifact is not None:
        return BaseFolder(source, fetch(source.artifact), source.artifact.digest)
    if source.path:
        return BaseFolder(source, model_folder(source.path, allowed, "base_model"))
    folder, _ = hub.download(source.hub_id, source.revision, target=workdir / "hub")
    return BaseFolder(source, folder)
