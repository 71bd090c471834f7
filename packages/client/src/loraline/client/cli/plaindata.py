"""Protobuf messages as plain data for JSON output: numbers stay numbers, enum values and references are readable."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import any_pb2, duration_pb2, json_format, struct_pb2, timestamp_pb2
from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2  # noqa: F401 - results inside Any are found by their registration
from loraline.api.merger.v1 import merger_pb2  # noqa: F401
from loraline.api.trainer.v1 import trainer_pb2  # noqa: F401
from loraline.client.refs import format_ref, kind_name


def as_data(value: Any) -> Any:
    """Return plain data for a message, or for lists and dictionaries of messages."""
    if isinstance(value, Message):
        return _message(value)
    if isinstance(value, dict):
        return {key: as_data(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(child) for child in value]
    return value


def enum_word(enum_type: Any, number: int) -> str:
    """Return an enum value without its prefix, such as SUCCEEDED."""
    value = enum_type.values_by_number.get(number)
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum_type.name).upper() + "_"
    return value.name.removeprefix(prefix) if value is not None else str(number)


def _message(message: Message) -> Any:
    if isinstance(message, timestamp_pb2.Timestamp):
        return message.ToJsonString()
    if isinstance(message, duration_pb2.Duration):
        return message.ToNanoseconds() / 1e9
    if isinstance(message, struct_pb2.Struct):
        return _whole(json_format.MessageToDict(message))
    if isinstance(message, any_pb2.Any):
        return _any(message)
    if isinstance(message, artifact_pb2.ArtifactRef):
        return _ref(message)
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields if _shown(message, field)}


def _whole(value: Any) -> Any:
    """Return a Struct's content with whole numbers as such: a Struct knows doubles only."""
    if isinstance(value, dict):
        return {key: _whole(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_whole(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Return plain data as dotted paths with their values, for people."""
    if isinstance(value, dict):
        return [pair for key, child in value.items() for pair in flat(child, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list) and any(isinstance(child, dict | list) for child in value):
        return [pair for index, child in enumerate(value) for pair in flat(child, f"{path}[{index}]")]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, f"{value:.6g}" if isinstance(value, float) else str(value))]


def _shown(message: Message, field: Any) -> bool:
    """Whether a field is there: lists and plain scalars always, so that the shape is stable."""
    return not field.has_presence or message.HasField(field.name)


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {str(key): _one(field.message_type.fields_by_name["value"], value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_one(field, item) for item in value]
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _message(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return value.hex() if isinstance(value, bytes) else value


def _any(message: any_pb2.Any) -> Any:
    try:
        data = json_format.MessageToDict(message)
    except TypeError:
        return {"type": message.TypeName()}
    from google.protobuf import symbol_database

    content = symbol_database.Default().GetSymbol(message.TypeName())()
    message.Unpack(content)
    return {"type": message.TypeName(), **_message(content)} if data else {}


def _ref(ref: artifact_pb2.ArtifactRef) -> dict[str, Any]:
    data: dict[str, Any] = {"text": format_ref(ref), "kind": kind_name(ref.kind), "name": ref.name}
    if ref.HasField("version"):
        data["version"] = ref.version
    elif ref.HasField("alias"):
        data["alias"] = ref.alias
    return data | ({"digest": ref.digest} if ref.digest else {})
