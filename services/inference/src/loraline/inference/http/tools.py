"""Tools as OpenAI's clients send them: `tools`, `tool_choice`, `parallel_tool_calls`, and messages about calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraline.inference.engines.port import Constraint
from loraline.inference.http import parameters

TOOL_PARAMETERS = {"tools", "tool_choice", "parallel_tool_calls"}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST_TOOLS = 128
_MOST_CALLS = 16
"""Calls that a required choice may make at once: without a bound a model may go on for ever."""
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True)
class AskedTools:
    """What a request says about tools."""

    tools: tuple[dict[str, Any], ...]
    choice: Literal["none", "auto", "required", "named"]
    name: str = ""
    """The tool of a named choice."""
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call, which decoding then enforces."""
        return self.choice in ("required", "named")

    @property
    def constraint(self) -> Constraint | None:
        """The shape of a forced answer: the named tool's arguments, or a list of calls."""
        if self.choice == "named":
            tool = next(tool for tool in self.tools if tool["function"]["name"] == self.name)
            return Constraint("json_schema", tool["function"]["parameters"])
        if self.choice != "required":
            return None
        definitions: dict[str, Any] = {}
        calls = [_call_schema(tool["function"], definitions) for tool in self.tools]
        most = _MOST_CALLS if self.parallel else 1
        return Constraint(
            "json_schema",
            {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}, **definitions},
        )

    def calls(self, text: str) -> list[tuple[str, str]]:
        """Return name and arguments (JSON) of each call in a whole forced answer."""
        if self.choice == "named":
            return [(self.name, text)]
        return [(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in json.loads(text)]


def asked_tools(body: Mapping[str, Any]) -> AskedTools | None:
    """Read what a body says about tools; None when it names none. INVALID_ARGUMENT names what is wrong."""
    given, choice = body.get("tools") or [], body.get("tool_choice")
    parallel = body.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise parameters.wrong("parallel_tool_calls", "must be true or false")
    if not isinstance(given, list) or len(given) > _MOST_TOOLS:
        raise parameters.wrong("tools", f"must be a list of at most {_MOST_TOOLS} tools")
    if not given:
        if choice not in (None, "none", "auto"):
            raise parameters.wrong("tool_choice", "needs tools")
        return None
    tools = tuple(_tool(position, tool) for position, tool in enumerate(given))
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise parameters.wrong("tools", "has two tools of one name")
    kind, name = _choice("auto" if choice is None else choice, names)
    if kind == "auto" and any(tool["function"].get("strict") for tool in tools):
        problem = "has a strict tool, which is kept only where a call is required or a tool is named in tool_choice"
        raise parameters.wrong("tools", problem)
    return AskedTools(tools, kind, name, parallel is not False)


def tool_calls(position: int, value: Any) -> list[dict[str, Any]]:
    """Return an earlier answer's calls with arguments as objects, as chat templates read them."""
    where = f"messages[{position}].tool_calls"
    if not isinstance(value, list):
        raise parameters.wrong("messages", f"has no list at {where}")
    found = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not isinstance(call.get("id"), str):
            raise parameters.wrong("messages", f"has a call without id or function at {where}")
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (ValueError, TypeError) as error:
            raise parameters.wrong("messages", f"has arguments that are no JSON at {where}: {error}") from None
        if not isinstance(arguments, dict):
            raise parameters.wrong("messages", f"has arguments that are no object at {where}")
        found.append({"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def _tool(position: int, tool: Any) -> dict[str, Any]:
    where = f"tools[{position}]"
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise parameters.wrong("tools", f"has no function at {where}; only tools of type function are supported")
    name, schema = function.get("name"), function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise parameters.wrong("tools", f"needs a name of up to 64 letters, digits, _ and - at {where}")
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise parameters.wrong("tools", f"has parameters at {where} that are no schema of an object")
    unknown = set(function) - {"name", "description", "parameters", "strict"}
    if unknown:
        raise parameters.wrong("tools", f"has {sorted(unknown)[0]} at {where}, which is not known")
    if not isinstance(function.get("description") or "", str):
        raise parameters.wrong("tools", f"has a description at {where} that is no text")
    return {"type": "function", "function": {**function, "parameters": schema}}


def _choice(choice: Any, names: Sequence[str]) -> tuple[Literal["none", "auto", "required", "named"], str]:
    if choice in ("none", "auto", "required"):
        return choice, ""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise parameters.wrong("tool_choice", 'must be "none", "auto", "required" or name a function')
    if name not in names:
        raise parameters.wrong("tool_choice", f"names {name!r}, which is not among the tools")
    return "named", name


def _call_schema(function: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one tool's call; its definitions go to the top, where its references look for them."""
    schema = dict(function["parameters"])
    for key in _DEFINITIONS:
        for name, part in (schema.pop(key, None) or {}).items():
            if definitions.setdefault(key, {}).setdefault(name, part) != part:
                raise parameters.wrong("tools", f"defines {name} in two ways; tool_choice required needs one")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "parameters": schema},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
