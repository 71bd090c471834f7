"""JSON values of protobuf Structs, which know no integers."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

_EXACT = 2**53
"""From here on a double does not tell neighbouring integers apart."""


def json_value(struct: Struct) -> Any:
    """Return a Struct as JSON values; whole numbers come back as integers, as a JSON schema's minItems must be."""
    return _whole(json_format.MessageToDict(struct))


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return value
