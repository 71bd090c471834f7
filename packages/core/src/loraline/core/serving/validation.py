"""Checks requests against the rules written in the protos, and says in words what was expected."""

from __future__ import annotations

import re
from typing import Any

import grpc
import protovalidate
from google.protobuf.message import Message

from loraline.core.errors import LoralineError

_MOST_FIELDS = 20
_validator = protovalidate.Validator()

_PATTERNS = {
    "^[a-z0-9][a-z0-9._-]{0,63}$": (
        "must be 1 to 64 lower-case letters, digits, `-`, `_` or `.`, starting with a letter or digit"
    ),
    "^[a-z][a-z0-9._-]{0,63}$": ("must be 1 to 64 lower-case letters, digits, `-`, `_` or `.`, starting with a letter"),
    "^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*(/[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*)?$": (
        "must be a Hub id such as `org/name`: letters, digits, `-`, `_`, and single dots between them"
    ),
    "^(sha256:[0-9a-f]{64})?$": "must be `sha256:` and 64 hex digits, or empty",
}
_COMPARISONS = {"lt": "less than", "lte": "at most", "gt": "more than", "gte": "at least"}


def field_path(violation: protovalidate.Violation) -> str:
    """Return the path of the field as a program would write it: `datasets[0].ref.name`, `labels["a"]`."""
    parts: list[str] = []
    proto = violation.proto
    for element in proto.field.elements if proto.field else ():
        text = element.field_name
        subscript: Any = element.subscript
        if subscript is not None:
            key = subscript.value
            text += f'["{key}"]' if isinstance(key, str) else f"[{key}]"
        parts.append(text)
    return ".".join(parts)


def expectation(violation: protovalidate.Violation) -> str:
    """Return what the rule expects, in words: `must be at most 500`."""
    rule_id, rule = violation.proto.rule_id, violation.rule_value
    kind, _, name = rule_id.partition(".")
    if rule_id == "required":
        return "is required"
    if name == "in":
        return f"must be one of {', '.join(map(str, rule))}"
    if kind in ("string", "bytes"):
        words = _string_words(name, rule)
    elif kind in ("repeated", "map"):
        words = _count_words(name, rule)
    elif kind == "enum":
        words = _enum_words(name)
    else:
        words = _number_words(name, rule)
    return words or _plain(violation.proto.message) or "is not valid"


def _string_words(name: str, rule: Any) -> str:
    if name == "pattern":
        return _PATTERNS.get(str(rule), f"must match the pattern {rule}")
    unit = "characters" if name.endswith("_len") else "bytes"
    if name in ("max_len", "max_bytes"):
        return f"must have at most {rule} {unit}"
    if name in ("min_len", "min_bytes"):
        return "must not be empty" if rule == 1 else f"must have at least {rule} {unit}"
    return ""


def _count_words(name: str, rule: Any) -> str:
    if name in ("max_items", "max_pairs"):
        return f"must have at most {rule} entries"
    if name in ("min_items", "min_pairs"):
        return "must have at least one entry" if rule == 1 else f"must have at least {rule} entries"
    if name == "unique":
        return "must not hold the same entry twice"
    return ""


def _enum_words(name: str) -> str:
    return {"defined_only": "must be one of the values that the API defines", "not_in": "must be set"}.get(name, "")


def _number_words(name: str, rule: Any) -> str:
    if name in _COMPARISONS:
        return f"must be {_COMPARISONS[name]} {rule}"
    return ""


def _plain(message: str) -> str:
    return re.sub(r"^value ", "", message)


def check(message: Message) -> None:
    """Raise INVALID_REQUEST with every field that breaks a rule of its proto."""
    violations = _validator.collect_violations(message)
    if violations:
        raise as_error(violations)


def as_error(violations: list[protovalidate.Violation]) -> LoralineError:
    """Return INVALID_ARGUMENT that names the first field in its message and all of them in `fields`."""
    fields: dict[str, str] = {}
    for violation in violations[:_MOST_FIELDS]:
        fields.setdefault(field_path(violation) or "(request)", expectation(violation))
    path, words = next(iter(fields.items()))
    more = len(violations) - 1
    also = f" {more} more field{'s are' if more > 1 else ' is'} wrong too." if more else ""
    text = f"{path} {words}.{also}" if path != "(request)" else f"The request {words}.{also}"
    return LoralineError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", text, fields=fields)
