"""The last rung of the salvage ladder: one object that ends but does not decode, mended where nothing can be lost.

A general repairer turns prose into data and completes what was cut off. So it only sees an object whose braces balance,
and its result counts only when it has every key of an item and exactly the letters and digits of the text, in order.
"""

from __future__ import annotations

import json
import re
from typing import Any

LONGEST = 100_000
ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)|[\n\r\t]", re.DOTALL)


def repaired(text: str, keys: frozenset[str]) -> dict[str, Any] | None:
    """Return the object that begins `text`, mended, or None when it cannot be mended without a guess."""
    source = _balanced(text[:LONGEST])
    if source is None:
        return None
    try:
        # Line breaks inside strings: forbidden in JSON, common, and not ambiguous.
        value: Any = json.loads(source, strict=False)
    except (ValueError, RecursionError):
        value = _mend(source)
    if not isinstance(value, dict) or not keys <= value.keys():
        return None
    return value if _substance(source) == _substance(json.dumps(value, ensure_ascii=False)) else None


def _mend(source: str) -> Any:
    from json_repair import repair_json

    try:
        return repair_json(source, return_objects=True, skip_json_loads=True)
    except (ValueError, RecursionError, IndexError):
        return None


def _balanced(text: str) -> str | None:
    """Return the text to the brace that closes the first one. Strings are not respected: quotes may be damaged."""
    depth = 0
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[: match.end()]
    return None


def _substance(text: str) -> str:
    """Return what no repair may change: letters and digits in their order."""
    return "".join(character for character in ESCAPE.sub("", text) if character.isalnum()).casefold()
