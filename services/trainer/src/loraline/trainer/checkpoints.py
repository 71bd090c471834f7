"""Checkpoints on disk: complete or not at all, verified before a run goes on from one.

transformers writes a checkpoint's files in place. A seal, written last, lists their digests; a folder without a seal,
or with a file that does not match it, is torn and never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEAL = "seal.json"
_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    """Return the optimizer step in the folder's name."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def seal(folder: Path) -> None:
    """Bring every file to the disk and write the seal."""
    digests = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        with file.open("rb") as content:
            digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
            os.fsync(content.fileno())
    partial = folder / f".{SEAL}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"version": _VERSION, "sha256": digests}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / SEAL)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint; empty when every file matches its seal."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        digests = content["sha256"]
        assert content["version"] == _VERSION and isinstance(digests, dict) and digests  # noqa: S101
    except FileNotFoundError:
        return "has no seal: it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return "has a damaged seal"
    for name, expected in digests.items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return f"lacks {name}"
        if found != expected:
            return f"has another {name} than was saved"
    return ""


def newest_good(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest checkpoint that verifies, and what is wrong with newer ones by folder name."""
    torn: dict[str, str] = {}
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    for path in sorted(found, key=step_of, reverse=True):
        problem = damage(path)
        if not problem:
            return path, torn
        torn[path.name] = problem
    return None, torn


def remove(folders: Iterable[Path]) -> None:
    """Delete checkpoints; the seal goes first, so that a half-deleted one is never taken for a good one."""
    for folder in folders:
        (folder / SEAL).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def rotate(folder: Path, *, keep: int, best: Path | None = None) -> None:
    """Delete old checkpoints: the newest sealed one, `keep` before it and the best stay."""
    sealed = [path for path in folder.glob("checkpoint-*") if (path / SEAL).is_file() and step_of(path) >= 0]
    sealed.sort(key=step_of, reverse=True)
    remove(path for path in sealed[1 + keep :] if best is None or path.resolve() != best.resolve())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trainer_state(folder: Path) -> dict[str, Any]:
    """Return the trainer_state.json of a checkpoint; empty when it cannot be read."""
    try:
        content = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
