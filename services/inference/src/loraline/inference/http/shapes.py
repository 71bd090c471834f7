"""The shape of an answer as HTTP clients ask for it: OpenAI's response_format, vLLM's own fields, and ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from loraline.inference.engines.port import Constraint
from loraline.inference.http import parameters

_MOST_RETRIES = 5
_Kind = Literal["json_schema", "regex", "choices", "grammar", "json_object"]
_VLLM: dict[str, _Kind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choices",
    "grammar": "grammar",
    "json_object": "json_object",
}
"""Fields of vLLM's structured_outputs; guided_json, guided_regex, guided_choice and guided_grammar before it."""
_GUIDED = {f"guided_{name}": name for name in _VLLM if name != "json_object"}
SHAPE_PARAMETERS = {"response_format", "structured_outputs", *_GUIDED, "language", "forbid", "retries"}


class AskedShape(TypedDict):
    """The part of a Question that is about the answer's shape."""

    constraint: Constraint | None
    shape_field: str
    language: str
    forbid: tuple[str, ...]
    retries: int
    cut_is_error: bool


def asked_shape(body: Mapping[str, Any]) -> AskedShape:
    """Read what a body asks of the answer's shape; INVALID_ARGUMENT names the field.

    An answer cut at its limit is OpenAI's `finish_reason: length`, unless `retries` asks for whole answers only.
    """
    found = {name: body[name] for name in ("response_format", "structured_outputs", *_GUIDED) if body.get(name)}
    if len(found) > 1:
        raise parameters.wrong(list(found)[1], f"stands beside {next(iter(found))}; an answer has one shape")
    constraint, field = None, ""
    for name, value in found.items():
        if name == "response_format":
            constraint, field = _response_format(value)
        elif name == "structured_outputs":
            constraint, field = _structured_outputs(value)
        else:
            constraint, field = _constraint(name, _VLLM[_GUIDED[name]], value), name
    retries = parameters.integer(body, "retries", 0)
    if retries is not None and retries > _MOST_RETRIES:
        raise parameters.wrong("retries", f"must be at most {_MOST_RETRIES}")
    return AskedShape(
        constraint=constraint,
        shape_field=field,
        language=parameters.text(body, "language"),
        forbid=forbidden(body),
        retries=retries or 0,
        cut_is_error=retries is not None,
    )


def forbidden(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Read what the answer's texts may not hold."""
    value = body.get("forbid") or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise parameters.wrong("forbid", "must be a list of names")
    return tuple(value)


def _response_format(value: Any) -> tuple[Constraint | None, str]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None, ""
    if kind == "json_object":
        return Constraint("json_object"), "response_format"
    schema = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return Constraint("json_schema", schema["schema"]), "response_format.json_schema.schema"
    problem = "must be of type text, json_object, or json_schema with json_schema.schema"
    raise parameters.wrong("response_format", problem)


def _structured_outputs(value: Any) -> tuple[Constraint | None, str]:
    if not isinstance(value, dict):
        raise parameters.wrong("structured_outputs", f"must be an object with one of {', '.join(_VLLM)}")
    given = {name: part for name, part in value.items() if part is not None and part is not False}
    unknown = [name for name in given if name not in _VLLM]
    if unknown:
        problem = f"is not supported; there are {', '.join(_VLLM)}"
        raise parameters.wrong(f"structured_outputs.{unknown[0]}", problem)
    if len(given) > 1:
        raise parameters.wrong("structured_outputs", f"has {' and '.join(given)}; an answer has one shape")
    for name, part in given.items():
        path = f"structured_outputs.{name}"
        return _constraint(path, _VLLM[name], part), path
    return None, ""


def _constraint(path: str, kind: _Kind, value: Any) -> Constraint:
    if kind == "json_object":
        return Constraint("json_object")
    if kind == "json_schema" and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise parameters.wrong(path, f"is no JSON: {error}") from None
    wanted: dict[str, tuple[type, str]] = {
        "json_schema": (dict, "a schema object"),
        "choices": (list, "a list of texts"),
    }
    known, words = wanted.get(kind, (str, "a text"))
    if not isinstance(value, known):
        raise parameters.wrong(path, f"must be {words}")
    return Constraint(kind, value)
