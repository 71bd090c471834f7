"""Reading JSON that anyone may have written: a wrong file is told apart, never a crash, never all of the memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 1024 * 1024
"""The largest tokenizers of today are a sixth of this."""


def load_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. ValueError or OSError says what is wrong with it."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file" if path.exists() else "it is missing")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than {MOST_BYTES}")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if b"\\ud" in raw or b"\\uD" in raw:
        _require_text(content)
    return content


def text_setting(config: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a config.json, or of the language model within it where that is a part of the whole."""
    inner = config.get("text_config")
    return config.get(name) or (inner.get(name) if isinstance(inner, dict) else None)


def _require_text(content: dict[str, Any]) -> None:
    """Refuse halves of surrogate pairs: such a text can be neither shown nor written again."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!r}, which is no character") from error
