"""JSON items out of a model's answer, by a strict ladder: nothing is invented, nothing half-written is kept.

1. The whole text is JSON. 2. A fenced block is. 3. Objects are decoded one by one where they stand, each complete or
not taken at all. 4. What is left of objects that end but do not decode is repaired, and the item says so. Text in
between is prose and stays prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from loraline.datagen.llms.repair import repaired

THINKING = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
THOUGHT_END = re.compile(r"</think>", re.IGNORECASE)
FENCE = re.compile(r"```[A-Za-z0-9_-]*[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL)
MOST_REPAIRS = 200
MOST_FAILURES = 2000
"""Openings that may fail to decode before the rest of a text is given up: bounds the work on hostile text."""
Rung = Literal["whole", "fenced", "objects", "repaired", "none"]
Item = dict[str, Any]


@dataclass
class Salvaged:
    """The items found in their order, the lowest rung of the ladder that was needed, and which items were repaired.

    `why` says what is wrong with a text that holds no item: `empty`, `no_json`, `no_item`, `cut_off`, `broken_json`
    or `too_deep`.
    """

    items: list[Item] = field(default_factory=list)
    rung: Rung = "none"
    repaired: frozenset[int] = frozenset()
    why: str = ""


def salvage(text: str, keys: Collection[str] = (), wrapper: str = "items", *, cut: bool = False) -> Salvaged:
    """Return the objects that a text holds: a list, an object with a list under `wrapper`, or loose objects.

    `keys` are those that every item has; with them an object nested in a damaged item cannot pose as an item. `cut`
    says that the model was stopped at its limit, so the last item is not repaired when it is broken.
    """
    try:
        return _climb(_without_thinking(text).strip().removeprefix("\ufeff"), frozenset(keys), wrapper, cut=cut)
    except RecursionError:
        return Salvaged(why="too_deep")


def _climb(text: str, needed: frozenset[str], wrapper: str, *, cut: bool) -> Salvaged:
    whole = _items(text, wrapper, needed)
    if whole is not None:
        return Salvaged(whole, "whole", why="" if whole else "no_item")
    blocks = list(FENCE.finditer(text))
    fenced = [_items(block[1].strip(), wrapper, needed) for block in blocks]
    outside = FENCE.sub("", text)
    # A fence inside an item's own text hides the outer one; then the objects are looked for one by one instead.
    if blocks and all(items is not None for items in fenced) and "{" not in outside:
        found = [item for items in fenced if items for item in items]
        return Salvaged(found, "fenced", why="" if found else "no_item")
    return _loose(text, needed, wrapper, cut=cut)


def _without_thinking(text: str) -> str:
    """Drop what a model thought aloud before its answer; some servers leave the opening tag out.

    Only before the answer: the same tag inside an item is the item's own text.
    """
    if THINKING.match(text):
        return THINKING.sub("", text, count=1)
    end = THOUGHT_END.search(text)
    return text[end.end() :] if end and "{" not in text[: end.start()] else text


def _items(text: str, wrapper: str, keys: frozenset[str]) -> list[Item] | None:
    try:
        return _unwrapped(json.loads(text), wrapper, keys)
    except (ValueError, RecursionError):
        return None


def _unwrapped(value: Any, wrapper: str, keys: frozenset[str]) -> list[Item] | None:
    if isinstance(value, dict):
        value = value[wrapper] if isinstance(value.get(wrapper), list) else _other_wrapper(value, keys) or [value]
    if not isinstance(value, list):
        return None
    return [item for item in value if isinstance(item, dict)]


def _other_wrapper(value: Item, keys: frozenset[str]) -> list[Item]:
    """Return the items of an object that wraps them under a name of the model's own choice."""
    if not keys or keys <= value.keys():
        return []
    lists = (inner for inner in value.values() if isinstance(inner, list))
    return [item for inner in lists for item in inner if isinstance(item, dict) and keys <= item.keys()]


@dataclass
class _Scan:
    """Objects in a text by where they stand, and the openings that did not decode."""

    found: list[tuple[int, int, list[Item]]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)


def _loose(text: str, keys: frozenset[str], wrapper: str, *, cut: bool) -> Salvaged:
    scan = _scan(text, keys, wrapper)
    mended = dict(_mended(text, scan, keys, cut=cut))
    places: list[tuple[int, Item, bool]] = []
    for start, _, items in scan.found:
        places.extend((start, item, False) for item in items)
    places.extend((start, item, True) for start, item in mended.items())
    places.sort(key=lambda place: place[0])
    if not places:
        return Salvaged(why=_why_none(text, scan))
    flags = frozenset(number for number, place in enumerate(places) if place[2])
    return Salvaged([item for _, item, _ in places], "repaired" if flags else "objects", flags)


def _scan(text: str, keys: frozenset[str], wrapper: str) -> _Scan:
    decoder, scan = json.JSONDecoder(), _Scan()
    opening = re.compile(rf'\{{\s*"{re.escape(wrapper)}"\s*:\s*\[')
    position = text.find("{")
    while position >= 0 and len(scan.failed) < MOST_FAILURES:
        wraps = opening.match(text, position)
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            if wraps:  # Only the wrapper is entered as such: its items are what was asked for.
                end = wraps.end()
            else:
                scan.failed.append(position)
                end = position + 1 if keys else _after_unfinished(text, position)
        else:
            items = _unwrapped(value, wrapper, keys) or [] if wraps or keys else [value]
            items = [item for item in items if keys <= item.keys()]
            # Damage can make one item swallow the next, as when its list does not close: the next is still whole.
            items += [inner for item in items for inner in _nested(item, keys)] if keys else []
            if items:
                scan.found.append((position, end, items))
        position = text.find("{", end)
    return scan


def _nested(value: Any, keys: frozenset[str]) -> Iterator[Item]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        if isinstance(part, dict) and keys <= part.keys():
            yield part
        yield from _nested(part, keys)


def _mended(text: str, scan: _Scan, keys: frozenset[str], *, cut: bool) -> Iterator[tuple[int, Item]]:
    """Yield repaired items with their places. Each begins like an item and ends before the next one."""
    begins = [start for start in scan.failed if _begins_item(text, start, keys)]
    begins = [start for start in begins if not any(begin <= start < end for begin, end, _ in scan.found)]
    stops = sorted([*begins, *(start for start, _, _ in scan.found), len(text)])
    for start in begins[:MOST_REPAIRS]:
        stop = next(stop for stop in stops if stop > start)
        item = None if cut and stop == len(text) else repaired(text[start:stop], keys)
        if item is not None:
            yield start, item


def _begins_item(text: str, position: int, keys: frozenset[str]) -> bool:
    match = re.match(r"\{\s*[\"']?([\w-]+)[\"']?\s*:", text[position : position + 200])
    return bool(match and match[1] in keys)


def _why_none(text: str, scan: _Scan) -> str:
    if not text:
        return "empty"
    if not scan.failed:
        return "no_item" if "{" in text else "no_json"
    return "cut_off" if text.count("{") > text.count("}") else "broken_json"


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
