"""What xgrammar, which both engines decode with, makes of a shape; asked before an engine is."""

from __future__ import annotations

import json
import re

from loraline.inference.engines.port import Constraint

_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""Time and line of C++ that xgrammar puts before its errors."""


def why_unusable(constraint: Constraint) -> str:
    """Return why a shape cannot be decoded, in the parser's words; nothing when it can, or when xgrammar is missing.

    An engine without xgrammar refuses shapes itself. Blocking; milliseconds.
    """
    try:
        import xgrammar
    except ImportError:
        return ""
    try:
        if constraint.kind == "regex":
            xgrammar.Grammar.from_regex(constraint.value)
        elif constraint.kind == "grammar":
            xgrammar.Grammar.from_ebnf(constraint.value)
        elif constraint.kind == "json_schema":
            xgrammar.Grammar.from_json_schema(json.dumps(constraint.value), any_whitespace=False, separators=(",", ":"))
    except (RuntimeError, ValueError) as error:
        return _PLACE.sub("", str(error).strip())
    return ""
