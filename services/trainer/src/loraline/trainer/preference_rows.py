"""Preference pairs: a prompt with the better and the worse answer, in the shapes that people have. Pure."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, str]]
_PROMPT_ROLES = ("system", "user", "assistant", "tool")


def is_pair(content: Any) -> bool:
    """Whether a row is a preference pair rather than a conversation."""
    return isinstance(content, dict) and "chosen" in content and "rejected" in content


def parse_pair(content: Any) -> tuple[Messages, Messages] | str:
    """Return the conversation with the chosen answer and that with the rejected one, or what is wrong with the row.

    `prompt` is a text (one question) or messages; `chosen` and `rejected` are a text, the answer's message in a list,
    or whole conversations that differ in their last message only and may leave `prompt` out.
    """
    if not is_pair(content):
        return "has no chosen and rejected answers: OBJECTIVE_DPO learns from pairs"
    sides: list[tuple[Messages | None, str]] = []
    for name in ("chosen", "rejected"):
        side = _side(content[name], name)
        if isinstance(side, str):
            return side
        sides.append(side)
    (before, chosen), (other, rejected) = sides
    if before != other:
        return "has another prompt before chosen than before rejected"
    prompt = before if before is not None else _prompt(content.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    if chosen.strip() == rejected.strip():
        return "has the same answer as chosen and as rejected"
    return [*prompt, _said(chosen)], [*prompt, _said(rejected)]


def _side(value: Any, name: str) -> tuple[Messages | None, str] | str:
    """Return the messages before the answer, None where there are none, and the answer; or what is wrong."""
    before: Messages | None = None
    if isinstance(value, list):
        messages = _messages(value, name)
        if isinstance(messages, str):
            return messages
        if not messages or messages[-1]["role"] != "assistant":
            return f"has no assistant message at the end of {name}"
        before, value = messages[:-1] or None, messages[-1]["content"]
    if not isinstance(value, str) or not value.strip():
        return f"has no text as {name}"
    return before, value


def _prompt(value: Any) -> Messages | str:
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else "has an empty prompt"
    if not isinstance(value, list) or not value:
        return "has no prompt"
    messages = _messages(value, "prompt")
    if not isinstance(messages, str) and messages[-1]["role"] == "assistant":
        return "has an assistant message at the end of its prompt, so that nothing is asked"
    return messages


def _messages(value: list[Any], name: str) -> Messages | str:
    for position, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in _PROMPT_ROLES:
            return f"has no known role in {name}[{position}]"
        if not isinstance(message.get("content"), str):
            return f"has no text as content in {name}[{position}]"
        if calls := calls_of(message):
            return f"has {calls}, which would not be learned, in {name}[{position}]"
    return [{"role": message["role"], "content": message["content"]} for message in value]


def calls_of(message: dict[str, Any]) -> str:
    """Return the key under which a message calls tools, which nothing here learns; empty where it calls none."""
    return next((key for key in ("tool_calls", "function_call") if message.get(key)), "")


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
