"""The checks of model folders for `loraline doctor --model`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from loraline.core.diagnostics import find
from loraline.core.preflight import Finding, Place
from loraline.merger.check.findings import Finding as FolderFinding
from loraline.merger.check.folder import check_folder

_LEVELS: dict[str, Literal["ok", "warning", "failed"]] = {"error": "failed", "warning": "warning", "info": "ok"}


def checks(place: Place) -> Iterator[Finding]:
    """Look into the model folder that the doctor was given, if any."""
    if place.model is None:
        return
    if not place.model.is_dir():
        yield Finding("model folder", "failed", f"there is no folder {place.model}", "MODEL_INCOMPLETE")
        return
    found = [_of(place.model, one) for one in check_folder(place.model)]
    yield from found
    if all(finding.level == "ok" for finding in found):
        yield Finding("model folder", "ok", f"{place.model} is whole")


def _of(folder: Path, found: FolderFinding) -> Finding:
    level = _LEVELS[found.severity]
    # A warning without an entry of its own has its message and remedy; what is missing files says is another matter.
    of_its_own = find(found.code) is not None
    reason = found.code if of_its_own else "MODEL_INCOMPLETE" if level == "failed" else ""
    said = f"{folder / found.file if found.file else folder}: {found.message} {found.remedy}"
    return Finding("model folder", level, said, "" if level == "ok" else reason)
