"""Ollama's Modelfile: written, and read again by its grammar to prove that it says what was meant.

Instructions and quoting follow Ollama's documentation of the Modelfile; TEMPLATE is Go's text/template with the
variables .System, .Messages, .Role and .Content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraline.core.errors import LoralineError, invalid_argument
from loraline.merger.exports.chat_shape import ChatShape

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "LICENSE", "MESSAGE")
"""ADAPTER is left out on purpose: Ollama 0.34.1 and later refuse it."""
# Name -> (type, least, greatest).
PARAMETERS: dict[str, tuple[type, float, float]] = {
    "num_ctx": (int, 1, 10_000_000),
    "num_predict": (int, -2, 10_000_000),
    "repeat_last_n": (int, -1, 10_000_000),
    "seed": (int, 0, 2**63 - 1),
    "top_k": (int, 0, 10_000_000),
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repeat_penalty": (float, 0, 100),
}
_FROM_GENERATION = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says."""

    source: str
    template: str = ""
    system: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    """In order; `stop` may come several times."""
    licences: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """Return the file's text. INVALID_ARGUMENT for texts that hold three quotes, which its grammar cannot quote."""
        lines = [f"FROM {self.source}"]
        if self.template:
            lines.append(f"TEMPLATE {_quoted(self.template, 'the chat template')}")
        if self.system:
            lines.append(f"SYSTEM {_quoted(self.system, 'system_prompt')}")
        lines += [f"PARAMETER {name} {_plain_or_quoted(value)}" for name, value in self.parameters]
        lines += [f"LICENSE {_quoted(text, 'the licence')}" for text in self.licences]
        return "\n".join(lines) + "\n"


def read_modelfile(text: str) -> Modelfile:
    """Read a Modelfile by its grammar: instruction, blank, value; a value in three quotes may span lines.

    Raises ValueError for anything else.
    """
    found: dict[str, list[str]] = {name: [] for name in INSTRUCTIONS}
    rest = text
    while rest.strip():
        rest = rest.lstrip()
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        match = re.match(r"([A-Za-z]+)[ \t]+", rest)
        if not match or match[1].upper() not in found:
            raise ValueError(f"no instruction at {rest[:40]!r}")
        name, rest = match[1].upper(), rest[match.end() :]
        lead = ""
        if name in ("PARAMETER", "MESSAGE"):
            key = re.match(r"(\S+)[ \t]+", rest)
            if not key:
                raise ValueError(f"{name} without a value")
            rest, lead = rest[key.end() :], key[1] + " "
        value, rest = _value(rest)
        found[name].append(f"{lead}{value}")
    if len(found["FROM"]) != 1:
        raise ValueError("a Modelfile has one FROM")
    parameters = tuple((name, value) for name, _, value in (one.partition(" ") for one in found["PARAMETER"]))
    template, system = "".join(found["TEMPLATE"][-1:]), "".join(found["SYSTEM"][-1:])
    return Modelfile(found["FROM"][0], template, system, parameters, tuple(found["LICENSE"]))


def _value(rest: str) -> tuple[str, str]:
    for quote in ('"""', '"'):
        if rest.startswith(quote):
            value, closed, after = rest[len(quote) :].partition(quote)
            if not closed or (quote == '"' and "\n" in value):
                raise ValueError(f"a quote is not closed at {rest[:40]!r}")
            return value, after
    value, _, after = rest.partition("\n")
    return value.strip(), after


def _quoted(text: str, what: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise invalid_argument(
            "MODELFILE_TEXT_INVALID", f"A Modelfile cannot hold {what}: it has three quotes in a row."
        )
    return f'"""{text}"""'


def _plain_or_quoted(value: str) -> str:
    return _quoted(value, "the parameter") if '"' in value or "\n" in value else f'"{value}"'


def go_template(shape: ChatShape) -> str:
    """Return the shape as a Go template. The begin token is left out: the runtime adds it when it tokenizes.

    An answer that ends the conversation is left open, so that the model continues it, as Ollama's own templates do.
    """
    around, default = shape.system or ("", ""), _literal(shape.default_system)
    user, answer = _around(shape.user, ".Content"), _literal(shape.answer[0]) + _act(".Content")
    if shape.system is None:
        head = [default]
    elif shape.folded:
        head = [_act("if not .System"), default, _act("end")] if default else []
    else:
        head = [
            _act("if .System"),
            _around(around, ".System"),
            *([_act("else"), default] if default else []),
            _act("end"),
        ]
    if shape.folded:
        first = _literal(around[0]) + _act("$.System") + _literal(around[1])
        begin = [_act("if and (eq $first $i) $.System"), first, _act("else"), _literal(shape.user[0]), _act("end")]
        user = "".join([*begin, _act(".Content"), _literal(shape.user[1])])
    track = [_act('if and (lt $first 0) (eq .Role "user")'), _act("$first = $i"), _act("end")] if shape.folded else []
    parts = [
        *head,
        _act("$first := -1") if shape.folded else "",
        _act("range $i, $_ := .Messages"),
        _act("$last := eq (len (slice $.Messages $i)) 1"),
        *track,
        *(_act('if eq .Role "user"'), user, _act('else if eq .Role "assistant"'), answer),
        *(_act("if not $last"), _literal(shape.answer[1]), _act("end"), _act("end")),
        *(_act('if and $last (ne .Role "assistant")'), _literal(shape.generation), _act("end")),
        _act("end"),
    ]
    return "".join(parts)


def _act(code: str) -> str:
    return "{{ " + code + " }}"


def _around(texts: tuple[str, str], variable: str) -> str:
    return _literal(texts[0]) + _act(variable) + _literal(texts[1])


def _literal(text: str) -> str:
    """Write fixed text as a quoted Go string in an action, so that no blank or brace of it is taken for syntax."""
    return _act(json.dumps(text, ensure_ascii=False)) if text else ""


def parameters_of(
    asked: Mapping[str, Any], generation: Mapping[str, Any], stops: Sequence[str]
) -> list[tuple[str, str]]:
    """Return PARAMETER lines: the model's own generation settings, over them what was asked, then the stop texts.

    Raises INVALID_ARGUMENT PARAMETER_INVALID for names that Ollama does not have and for values out of range.
    """
    values: dict[str, str] = {}
    for theirs, ours in _FROM_GENERATION.items():
        if isinstance(generation.get(theirs), int | float) and not isinstance(generation[theirs], bool):
            values[ours] = _number(ours, generation[theirs])
    more: list[str] = []
    for name, value in asked.items():
        if name == "stop":
            more += [str(one) for one in (value if isinstance(value, list) else [value])]
        else:
            values[name] = _number(name, value)
    return [*values.items(), *(("stop", text) for text in dict.fromkeys([*stops, *more]) if text)]


def _number(name: str, value: Any) -> str:
    if name not in PARAMETERS:
        raise _invalid(name, f"Ollama has no such parameter; it has stop, {', '.join(PARAMETERS)}")
    kind, least, greatest = PARAMETERS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= greatest:
        raise _invalid(name, f"{value!r} is no number from {least:g} to {greatest:g}")
    if kind is int and value != int(value):
        raise _invalid(name, f"{value!r} is no whole number")
    return str(int(value)) if kind is int else f"{value:g}"


def _invalid(name: str, why: str) -> LoralineError:
    error = invalid_argument("PARAMETER_INVALID", f"parameters.{name}: {why}.")
    error.fields[f"parameters.{name}"] = why
    return error
