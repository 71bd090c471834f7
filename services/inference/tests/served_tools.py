"""A toy whose chat template shows tools, writes their calls as Hermes models do, and takes what they returned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from served_profiles import widened

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a harbour.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
BOAT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find-boat",
        "parameters": {
            "type": "object",
            "properties": {"size": {"$ref": "#/$defs/size"}},
            "required": ["size"],
            "additionalProperties": False,
            "$defs": {"size": {"enum": ["small", "large"]}},
        },
    },
}
CALL = r'<tool_call>\{"name": "weather", "arguments": \{"city": "[a-z]{3,5}", "days": [123]\}\}</tool_call>'
"""What a model that was trained for it would write; a random one is held to it by this regular expression."""


def with_tools(model: Path, folder: Path) -> Path:
    """Copy a model with the template and a window for tools."""
    widened(model, folder, 2048)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def without_template(folder: Path) -> None:
    """Take the chat template away from a model's folder."""
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    content.pop("chat_template", None)
    config.write_text(json.dumps(content))
