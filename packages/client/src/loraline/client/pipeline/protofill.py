"""YAML into protobuf messages, key by key: the contract's field names are the file's keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import duration_pb2, json_format, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.client.errors import LoralineApiError
from loraline.client.pipeline.document import Node, plain, shown, unknown_key
from loraline.client.refs import parse_ref

# Fields are typed Any: the two descriptor implementations of protobuf share no type.
Aliases = Mapping[str, str]

INTEGERS = {
    FieldDescriptor.TYPE_INT32: 31,
    FieldDescriptor.TYPE_INT64: 63,
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
}
_DURATION = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>ms|s|m|min|h|d)")
_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_REFUSED = object()


def fill(
    message: Message,
    node: Node,
    *,
    aliases: Aliases | None = None,
    hints: dict[str, str] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """Set a message's fields from a mapping; mistakes are noted at their places.

    `aliases` maps other names of a key to the field, with a dot for one inside a message; `without` names fields that
    a file does not set; `hints` says what to do instead of some unknown keys.
    """
    fields = {name: field for name, field in message.DESCRIPTOR.fields_by_name.items() if name not in without}
    given: dict[str, str] = {}
    for key, child in node.mapping().items():
        path = (aliases or {}).get(key, key)
        if path in given:
            child.fault(f"says the same as `{given[path]}`, which is given too. Keep one of them.")
            continue
        given[path] = key
        holder, name = _holder(message, path)
        field = fields.get(name) if holder is message else holder.DESCRIPTOR.fields_by_name[name]
        if field is None:
            child.fault(unknown_key(key, [*fields, *(aliases or {})], hints))
        else:
            set_field(holder, field, child)


def _holder(message: Message, path: str) -> tuple[Message, str]:
    *outer, name = path.split(".")
    for part in outer:
        message = getattr(message, part)
    return message, name


def set_field(message: Message, field: Any, node: Node) -> None:
    """Set one field from a value."""
    if node.value is None:
        node.fault("has no value. Leave the key out or give it one.")
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        _set_map(message, field, node)
    elif field.is_repeated:
        _set_list(message, field, node)
    elif field.message_type is not None:
        _set_message(getattr(message, field.name), node)
    else:
        value = scalar(field, node)
        if value is not _REFUSED:
            setattr(message, field.name, value)


def _set_map(message: Message, field: Any, node: Node) -> None:
    target, value_field = getattr(message, field.name), field.message_type.fields_by_name["value"]
    for key, child in node.mapping().items():
        if value_field.message_type is not None:
            _set_message(target[key], child)
        elif (value := scalar(value_field, child)) is not _REFUSED:
            target[key] = value


def _set_list(message: Message, field: Any, node: Node) -> None:
    target = getattr(message, field.name)
    for child in node.sequence():
        if field.message_type is not None:
            _set_message(target.add(), child)
        elif (value := scalar(field, child)) is not _REFUSED:
            target.append(value)


def _set_message(message: Message, node: Node) -> None:
    short = _SHORT_FORMS.get(message.DESCRIPTOR.full_name)
    if short is None or not short(message, node):
        message.SetInParent()
        fill(message, node)


def scalar(field: Any, node: Node) -> Any:
    """Return a scalar of the field's type, or note the mistake."""
    value = node.value
    if field.type == FieldDescriptor.TYPE_STRING:
        return node.text() or ("" if value == "" else _REFUSED)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return value if isinstance(value, bool) else _refuse(node, "must be true or false")
    if field.type == FieldDescriptor.TYPE_ENUM:
        return _enum(field, node)
    if field.type in INTEGERS:
        return _integer(field, node)
    number = as_number(value)
    return _refuse(node, "must be a number") if number is None else float(number)


def as_number(value: Any) -> float | int | None:
    """Return a number, also for `2e-4`, which YAML 1.1 takes for text; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return float(value)
    return None


def _integer(field: Any, node: Node) -> Any:
    number = as_number(node.value)
    if number is None or number != int(number):
        return _refuse(node, "must be a whole number")
    unsigned = field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
    top = 2 ** INTEGERS[field.type] - 1
    if not (0 if unsigned else -top) <= number <= top:
        return _refuse(node, f"must be at most {top}")
    return int(number)


def _enum(field: Any, node: Node) -> Any:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field.enum_type.name).upper() + "_"
    choices = {
        value.name.removeprefix(prefix).lower(): value.number for value in field.enum_type.values if value.number
    }
    # YAML 1.1 reads a bare `none` as text but `no`/`off` as false.
    word = node.value.lower().replace("-", "_") if isinstance(node.value, str) else ""
    if word.removeprefix(prefix.lower()) in choices:
        return choices[word.removeprefix(prefix.lower())]
    return _refuse(node, f"must be one of {', '.join(choices)}")


def _refuse(node: Node, wanted: str) -> Any:
    node.fault(f"{wanted}, not {shown(node.value)}.")
    return _REFUSED


def fill_ref(message: artifact_pb2.ArtifactRef, node: Node, default_kind: str = "") -> bool:
    """Set a reference from text such as `adapter/mareva:v3`."""
    try:
        message.CopyFrom(parse_ref(node.text(), default_kind))
    except LoralineApiError as error:
        if isinstance(node.value, str):
            node.fault(error.message)
    return True


def _fill_struct(message: struct_pb2.Struct, node: Node) -> bool:
    if isinstance(node.value, dict):
        json_format.ParseDict(plain(node), message)
    else:
        node.fault(f"must be a mapping, not {shown(node.value)}.")
    return True


def _fill_duration(message: duration_pb2.Duration, node: Node) -> bool:
    number = as_number(node.value)
    match = _DURATION.fullmatch(node.value.strip()) if isinstance(node.value, str) else None
    if number is None and match:
        number = float(match["number"]) * _UNIT_SECONDS[match["unit"]]
    if number is None:
        node.fault(f"must be a time such as 30s, 5m or 1h, not {shown(node.value)}.")
    else:
        message.FromNanoseconds(round(number * 1e9))
    return True


def _fill_pool(message: datagen_pb2.Pool, node: Node) -> bool:
    if not isinstance(node.value, list):
        return False
    for child in node.value:
        _set_message(message.items.add(), child)
    return True


def _from_text(field: str) -> Callable[[Any, Node], bool]:
    """Return a short form: bare text sets one field."""

    def short(message: Any, node: Node) -> bool:
        if isinstance(node.value, dict):
            return False
        setattr(message, field, node.text())
        return True

    return short


_SHORT_FORMS: dict[str, Callable[[Any, Node], bool]] = {
    artifact_pb2.ArtifactRef.DESCRIPTOR.full_name: fill_ref,
    struct_pb2.Struct.DESCRIPTOR.full_name: _fill_struct,
    duration_pb2.Duration.DESCRIPTOR.full_name: _fill_duration,
    datagen_pb2.Pool.DESCRIPTOR.full_name: _fill_pool,
    datagen_pb2.PoolItem.DESCRIPTOR.full_name: _from_text("text"),
    datagen_pb2.LlmEndpoint.DESCRIPTOR.full_name: _from_text("name"),
}
