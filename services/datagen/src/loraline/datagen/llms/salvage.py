"""JSON items out of a model's answer, by a strict ladder: nothing is invented, nothing half-written is kept.

1. The whole text is JSON. 2. A fenced block is. 3. Objects are decoded one by one where they stand, each complete or
not taken at all. Text in between is prose and stays prose.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
FENCE = re.compile(r"```[A-Za-z0-9_-]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
Rung = Literal["whole", "fenced", "objects", "none"]


@dataclass
class Salvaged:
    """The items found, and the rung of the ladder that found them."""

    items: list[dict[str, Any]] = field(default_factory=list)
    rung: Rung = "none"


def salvage(text: str, wrapper: str = "items") -> Salvaged:
    """Return the objects that the text holds: a list, an object with a list under `wrapper`, or loose objects."""
    text = THINKING.sub("", text).strip().removeprefix("\ufeff")
    whole = _items(text, wrapper)
    if whole is not None:
        return Salvaged(whole, "whole")
    fenced = [items for block in FENCE.findall(text) if (items := _items(block.strip(), wrapper)) is not None]
    if any(fenced):
        return Salvaged([item for items in fenced for item in items], "fenced")
    loose = _loose_objects(text, wrapper)
    return Salvaged(loose, "objects") if loose else Salvaged()


def _items(text: str, wrapper: str) -> list[dict[str, Any]] | None:
    try:
        return _unwrapped(json.loads(text), wrapper)
    except (ValueError, RecursionError):
        return None


def _unwrapped(value: Any, wrapper: str) -> list[dict[str, Any]] | None:
    if isinstance(value, dict):
        value = value[wrapper] if isinstance(value.get(wrapper), list) else [value]
    if not isinstance(value, list):
        return None
    return [item for item in value if isinstance(item, dict)]


def _loose_objects(text: str, wrapper: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    position = text.find("{")
    while position >= 0:
        opening = re.match(rf'\{{\s*"{re.escape(wrapper)}"\s*:\s*\[', text[position:])
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            # An unfinished object is skipped whole, so that a complete object nested in it does not pose as an item.
            # Only the wrapper itself is entered: its items are what was asked for.
            end = position + opening.end() if opening else _after_unfinished(text, position)
        else:
            found.extend((_unwrapped(value, wrapper) or []) if opening else [value])
        position = text.find("{", end)
    return found


def _after_unfinished(text: str, start: int) -> int:
    """Return where the object at `start` ends by its braces, strings respected.

    A brace that never closes and does not look like an object's is prose, and the text goes on behind it.
    """
    depth, inside, escaped = 0, False, False
    for position in range(start, len(text)):
        character = text[position]
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position + 1
    return len(text) if re.match(r'\{\s*["}]', text[start : start + 64]) else start + 1
