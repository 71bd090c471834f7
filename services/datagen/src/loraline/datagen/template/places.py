"""`{pool}` places in a template's texts. `{{` and `}}` stand for braces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def pools_in(value: Any) -> set[str]:
    """Return the pools that a text, or the strings of a JSON value, name."""
    if isinstance(value, str):
        return {match[1] for match in PLACE.finditer(value) if match[1] is not None}
    if isinstance(value, Mapping):
        return set().union(*(pools_in(part) for pair in value.items() for part in pair))
    if isinstance(value, list):
        return set().union(*(pools_in(part) for part in value))
    return set()


def fill(value: Any, values: Mapping[str, str]) -> Any:
    """Return the text or JSON value with every place filled."""
    if isinstance(value, str):
        return PLACE.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], value)
    if isinstance(value, Mapping):
        return {fill(name, values): fill(part, values) for name, part in value.items()}
    if isinstance(value, list):
        return [fill(part, values) for part in value]
    return value
