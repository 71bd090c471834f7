"""JSON schemas: refused where they are none, and rewritten into what decoding can enforce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.language.rules import LanguageRule

_MAX_DEPTH = 48
"""Levels of a schema; compiling time grows steeply with them."""
_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
"""What decoding enforces of `format`; the rest is checked after."""
_PRINTABLE = "[ !#-\\[\\]-\ud7ff\ue000-\U0010ffff]"
"""What a JSON string holds without an escape; as ranges: the class of all others takes in half characters."""
_CHECKED_AFTER = ("multipleOf", "uniqueItems", "contains", "minContains", "maxContains")
_VALUES = ("const", "enum", "default", "examples", "required", "dependentRequired")
"""Keywords whose content holds no schema."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose content maps names to schemas."""


def validator(schema: Mapping[str, Any], field: str) -> jsonschema_rs.Validator:
    """Return the check of whole answers. INVALID_ARGUMENT STRUCTURE_INVALID says where in the schema what is wrong.

    Patterns are matched in linear time, and nothing is fetched from anywhere.
    """
    if _depth(schema) > _MAX_DEPTH:
        raise refused(field, f"it is nested more than {_MAX_DEPTH} levels deep")
    try:
        jsonschema_rs.meta.validate(dict(schema))
        return jsonschema_rs.validator_for(
            dict(schema), offline=True, validate_formats=True, pattern_options=jsonschema_rs.RegexOptions()
        )
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        where = "/".join(str(part) for part in getattr(error, "instance_path", ()))
        text = str(getattr(error, "message", "") or error).strip().splitlines()[0]
        raise refused(field, f"at {where or 'its top'}: {text}") from None


def decodable(schema: Mapping[str, Any], field: str, rule: LanguageRule | None) -> dict[str, Any]:
    """Return a schema for decoding: texts bound to the language, and without what only a check afterwards can see.

    INVALID_ARGUMENT STRUCTURE_INVALID names the keyword that decoding would silently pass over.
    """
    return _Rewriting(field, rule).schema(dict(schema), "")


def with_bounded_texts(schema: Any, most: int) -> Any:
    """Return a schema whose texts have at most `most` characters where it says nothing: models may loop on blanks."""
    if isinstance(schema, list):
        return [with_bounded_texts(part, most) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name in _VALUES:
            found[name] = value
        elif name in _MAPS and isinstance(value, dict):
            found[name] = {key: with_bounded_texts(part, most) for key, part in value.items()}
        else:
            found[name] = with_bounded_texts(value, most)
    bounded = {"maxLength", "enum", "const", "pattern", "format"} & found.keys()
    return {**found, "maxLength": most} if "string" in _types(found) and not bounded else found


def refused(field: str, why: str) -> LoralineError:
    """Return INVALID_ARGUMENT STRUCTURE_INVALID for a shape that cannot be used."""
    message = f"{field} cannot be used: {why.rstrip('.')}."
    return invalid_argument("STRUCTURE_INVALID", message, **{field.replace(".", "__"): message})


class _Rewriting:
    def __init__(self, field: str, rule: LanguageRule | None):
        self._field = field
        self._rule = rule

    def schema(self, schema: Any, path: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        self._refuse_unenforceable(schema, path)
        found = {name: self._value(name, value, path) for name, value in schema.items() if name not in _CHECKED_AFTER}
        return self._string(found) if "string" in _types(schema) else found

    def _value(self, name: str, value: Any, path: str) -> Any:
        here = f"{path}/{name}"
        if name in _VALUES:
            return value
        if name in _MAPS and isinstance(value, dict):
            return {key: self.schema(part, f"{here}/{key}") for key, part in value.items()}
        if isinstance(value, list):
            return [self.schema(part, f"{here}/{position}") for position, part in enumerate(value)]
        return self.schema(value, here)

    def _string(self, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("format") not in (None, *_FORMATS):
            del schema["format"]
        fixed = any(name in schema for name in ("enum", "const", "pattern", "format"))
        bounded = "minLength" in schema or "maxLength" in schema
        if not (fixed or bounded or self._rule):
            return schema
        least, most = int(schema.pop("minLength", 0)), schema.pop("maxLength", None)
        if not fixed and self._rule is not None:
            schema["pattern"] = self._rule.string_pattern(least, None if most is None else int(most))
        elif not fixed:
            # Where lengths are bounded, xgrammar lets raw control characters through, which no JSON may hold, and takes
            # several times as long to compile as for the same bounds in a pattern.
            schema["pattern"] = f"^{_PRINTABLE}{{{least},{'' if most is None else int(most)}}}$"
        return schema

    def _refuse_unenforceable(self, schema: dict[str, Any], path: str) -> None:
        clashes = []
        if len(schema.get("allOf") or ()) > 1:
            clashes.append("allOf with several parts")
        if "patternProperties" in schema and ("properties" in schema or len(schema["patternProperties"]) > 1):
            clashes.append("patternProperties beside properties or with several patterns")
        if "propertyNames" in schema and {"properties", "patternProperties"} & set(schema):
            clashes.append("propertyNames beside properties or patternProperties")
        if clashes:
            text = f"at {path or 'its top'}: {clashes[0]} cannot be enforced while decoding; write one plain schema"
            raise refused(self._field, text)


def _types(schema: Mapping[str, Any]) -> set[str]:
    found = schema.get("type")
    return {found} if isinstance(found, str) else {item for item in found or () if isinstance(item, str)}


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level and deepest <= _MAX_DEPTH:
        deepest += 1
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
    return deepest
