"""What was served last, so that a restarted server serves it again: a small JSON file in the data folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import json_format

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.refs import format_ref

_log = structlog.get_logger(__name__)


@dataclass
class ServedState:
    """The base model and the adapters that people loaded, and those that they took out."""

    model: BaseModel | None = None
    served_name: str = ""
    adapters: list[str] = field(default_factory=list)
    """Exact references, such as `adapter/mareva:v3`."""
    withdrawn: list[str] = field(default_factory=list)
    """References with digest that UnloadAdapter took out: they are not loaded on first use."""


class StateFile:
    """Reads and writes the state; a file that cannot be read is an empty state, and said in the log."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> ServedState:
        """Return what was saved last."""
        try:
            content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            model = json_format.ParseDict(content["model"], BaseModel()) if content.get("model") else None
            return ServedState(
                model=model,
                served_name=str(content.get("served_name", "")),
                adapters=[str(item) for item in content.get("adapters", [])],
                withdrawn=[str(item) for item in content.get("withdrawn", [])],
            )
        except FileNotFoundError:
            return ServedState()
        except (OSError, ValueError, TypeError, AttributeError, KeyError, json_format.ParseError) as error:
            _log.warning("state_unreadable", path=str(self._path), error=str(error))
            return ServedState()

    def write(self, state: ServedState) -> None:
        """Save the state so that readers see all of it or the one before."""
        content = {
            "model": json_format.MessageToDict(state.model) if state.model is not None else None,
            "served_name": state.served_name,
            "adapters": state.adapters,
            "withdrawn": state.withdrawn,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def content_of(exact: ArtifactRef) -> str:
    """Name an exact artifact for good: a deleted version's number never comes back, another store's may."""
    return f"{format_ref(exact)} {exact.digest}"
