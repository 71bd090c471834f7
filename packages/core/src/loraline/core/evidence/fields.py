"""Checked reading of the evidence files: a malformed file names its file, field and row instead of a KeyError later."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, data_loss, not_found

_MAX_BYTES = 64 * 1024 * 1024


class Fields:
    """A JSON object with typed getters. `where` is the path of the object inside the file, for the errors."""

    def __init__(self, content: Any, file: Path, where: str, reason: str):
        self.file, self.where, self.reason = file, where, reason
        if not isinstance(content, dict):
            raise self.error("", "is not an object")
        self.content: dict[str, Any] = content

    def error(self, name: str, problem: str) -> LoralineError:
        """Return DATA_LOSS that names the file and the field."""
        path = ".".join(part for part in (self.where, name) if part) or "the content"
        message = f"{self.file.name}: {path} {problem}. The file was changed or written by something else; train again."
        return data_loss(self.reason, message, file=str(self.file), field=path)

    def text(self, name: str) -> str:
        """Return a string."""
        value = self.content.get(name)
        if not isinstance(value, str):
            raise self.error(name, "is not a string")
        return value

    def integer(self, name: str) -> int:
        """Return a whole number that is not negative."""
        value = self.content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(name, "is not a whole number of at least 0")
        return value

    def integers(self, name: str) -> list[int]:
        """Return a list of whole numbers that are not negative."""
        values = self._list(name)
        for position, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise self.error(f"{name}[{position}]", "is not a whole number of at least 0")
        return values

    def numbers(self, name: str) -> list[float]:
        """Return a list of finite numbers."""
        values = self._list(name)
        for position, value in enumerate(values):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise self.error(f"{name}[{position}]", "is not a finite number")
        return [float(value) for value in values]

    def messages(self, name: str) -> list[dict[str, str]]:
        """Return chat messages: objects with a role and a content, both strings."""
        values = self._list(name)
        for position, value in enumerate(values):
            known = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
            if not known:
                raise self.error(f"{name}[{position}]", "is not a message with role and content")
        return values

    def objects(self, name: str) -> list[Fields]:
        """Return a list of objects."""
        prefix = f"{self.where}." if self.where else ""
        return [
            Fields(value, self.file, f"{prefix}{name}[{position}]", self.reason)
            for position, value in enumerate(self._list(name))
        ]

    def object(self, name: str) -> Fields:
        """Return an object."""
        prefix = f"{self.where}." if self.where else ""
        return Fields(self.content.get(name), self.file, f"{prefix}{name}", self.reason)

    def _list(self, name: str) -> list[Any]:
        value = self.content.get(name)
        if not isinstance(value, list):
            raise self.error(name, "is not a list")
        return value


def read_object(path: Path, *, version: int, missing: str, malformed: str) -> Fields:
    """Read a JSON object of a known version; `missing` and `malformed` are the reasons of the errors."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise data_loss(malformed, f"{path.name} has {size} bytes, more than any file of ours.", file=str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{path.name} is missing in {path.parent}. Train the adapter with this platform to get one."
        raise not_found(missing, message, file=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise data_loss(malformed, f"{path.name} cannot be read: {error}", file=str(path)) from error
    fields = Fields(content, path, "", malformed)
    found = fields.integer("version")
    if found != version:
        raise fields.error("version", f"is {found}; this program reads {version}")
    return fields


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
