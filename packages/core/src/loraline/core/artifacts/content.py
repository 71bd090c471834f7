"""What an uploaded folder must hold to be of its kind: little, but enough that no stage starts on something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from loraline.api.artifact.v1 import artifact_pb2
from loraline.core.artifacts.refs import KIND_NAMES
from loraline.core.artifacts.safetensors import read_header
from loraline.core.errors import LoralineError, invalid_argument

_ROWS_READ = 1000
"""Rows of a dataset that are looked at; the trainer reads them all, and names those it cannot use."""


def check_content(kind: int, folder: Path) -> None:
    """Raise INVALID_ARGUMENT CONTENT_NOT_OF_KIND naming the file that an artifact of this kind must have otherwise."""
    check = _CHECKS.get(kind)
    if check is not None:
        check(folder)


def _dataset(folder: Path) -> None:
    kind, name = artifact_pb2.ARTIFACT_KIND_DATASET, "train.jsonl"
    with _present(kind, folder, name).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number > _ROWS_READ:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise _wrong(kind, f"{name}:{number}", f"is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise _wrong(kind, f"{name}:{number}", "is no JSON object")


def _adapter(folder: Path) -> None:
    kind = artifact_pb2.ARTIFACT_KIND_ADAPTER
    _object(kind, _present(kind, folder, "adapter_config.json"))
    _weights(kind, _present(kind, folder, "adapter_model.safetensors"))


def _model(folder: Path) -> None:
    kind = artifact_pb2.ARTIFACT_KIND_MODEL
    _object(kind, _present(kind, folder, "config.json"))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _wrong(kind, "*.safetensors", "is missing: weights of other formats are not served")
    for file in files:
        _weights(kind, file)


def _present(kind: int, folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise _wrong(kind, name, "is missing")
    return folder / name


def _object(kind: int, file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _wrong(kind, file.name, f"is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise _wrong(kind, file.name, "is no JSON object")


def _weights(kind: int, file: Path) -> None:
    try:
        tensors = read_header(file)
    except (ValueError, RecursionError) as error:
        raise _wrong(kind, file.name, f"is no safetensors file ({error})") from error
    if not tensors:
        raise _wrong(kind, file.name, "holds no tensor")


def _wrong(kind: int, file: str, problem: str) -> LoralineError:
    word = KIND_NAMES[kind]
    message = (
        f"This is no {word}: {file} {problem}. Upload the folder that holds it, or files as they are as a source "
        "(`loraline artifacts push FOLDER source/NAME`)."
    )
    error = invalid_argument("CONTENT_NOT_OF_KIND", message)
    error.fields = {file: problem}
    return error


_CHECKS: dict[int, Callable[[Path], None]] = {
    artifact_pb2.ARTIFACT_KIND_DATASET: _dataset,
    artifact_pb2.ARTIFACT_KIND_ADAPTER: _adapter,
    artifact_pb2.ARTIFACT_KIND_MODEL: _model,
}
