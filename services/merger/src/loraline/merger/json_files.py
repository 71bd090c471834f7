"""Reading JSON of models and adapters into typed errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraline.core.errors import data_loss
from loraline.core.model_files.objects import load_object


def read_json(path: Path, reason: str) -> dict[str, Any]:
    """Read a JSON object; DATA_LOSS with `reason` when it is none."""
    try:
        return load_object(path)
    except (OSError, ValueError) as error:
        raise data_loss(reason, f"{path.name} cannot be read: {error}. Save it again.", file=path.name) from error
