"""JSON schemas of items, compiled. No schema is ever fetched from another address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jsonschema_rs

from loraline.core.errors import LoralineError, invalid_argument


class ItemValidator(Protocol):
    """Tells whether an item fits a schema."""

    def is_valid(self, instance: Any) -> bool:
        """Return whether it fits."""
        ...


def compiled(schema: Mapping[str, Any]) -> ItemValidator:
    """Return the schema's validator; INVALID_ARGUMENT says what is wrong with it."""
    try:
        return jsonschema_rs.Draft202012Validator(dict(schema), offline=True)
    except ValueError as error:
        said = str(getattr(error, "message", "") or error).splitlines()[0]
        raise bad_schema(f"it is no JSON schema: {said}") from error


def bad_schema(why: str) -> LoralineError:
    """Return the error of an item_schema that cannot be used."""
    return invalid_argument("ITEM_SCHEMA_INVALID", f"item_schema cannot be used: {why}.", item_schema=why)


def required_keys(schema: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys that every item has; they tell an item from what is nested in it."""
    required = schema.get("required")
    return frozenset(str(name) for name in required) if isinstance(required, list) else frozenset()
