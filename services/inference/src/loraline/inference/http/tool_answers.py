"""Answers that call tools, in OpenAI's shapes: whole, and in pieces."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from loraline.core.errors import invalid_argument
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.port import Piece
from loraline.inference.engines.tool_calls import ToolReader
from loraline.inference.http.tools import AskedTools

_NO_TEMPLATE = (
    "The served model's chat template does not show tools to the model, so it cannot know them. Leave tools out, or "
    "serve a model whose template has them."
)
_NO_PARSER = (
    'tool_choice "auto" needs to know how the model writes calls: an operator sets LORALINE_INFERENCE_TOOL_PARSER, '
    'such as hermes. "required" or a named tool works without.'
)


class ToolAnswers:
    """Makes messages and deltas of one response to a question with tools."""

    def __init__(self, asked: AskedTools, reader: Callable[[], ToolReader]):
        self._asked = asked
        self._reader = reader
        self._readers: dict[int, ToolReader] = {}
        self._called: set[int] = set()

    def message(self, text: str, reason: str) -> tuple[dict[str, Any], str]:
        """Return an answer's message, and its finish reason."""
        content, calls = ("", self._asked.calls(text)) if self._asked.forced else self._reader().whole(text)
        message: dict[str, Any] = {"role": "assistant", "content": content or None, "refusal": None}
        if calls:
            message["tool_calls"] = _calls(calls)
        return message, self._finish(bool(calls), reason)

    def delta(self, piece: Piece) -> tuple[dict[str, Any], str]:
        """Return what a piece adds to its answer, empty for nothing yet, and its finish reason."""
        if self._asked.forced:  # comes as one piece, once it is known to be right
            message, reason = self.message(piece.text, piece.finish_reason)
            calls = [{"index": index, **call} for index, call in enumerate(message["tool_calls"])]
            return {"tool_calls": calls}, reason
        reader = self._readers.setdefault(piece.index, self._reader())
        text, found = reader.more(piece.text, piece.token_ids)
        if found:
            self._called.add(piece.index)
        if piece.finish_reason and piece.index not in self._called:
            text += reader.rest()
        delta: dict[str, Any] = {"content": text} if text else {}
        if found:
            delta["tool_calls"] = found
        return delta, self._finish(piece.index in self._called, piece.finish_reason)

    def _finish(self, called: bool, reason: str) -> str:
        return "tool_calls" if called and reason == "stop" and self._asked.choice != "named" else reason


def tool_answers(asked: AskedTools, chat_format: ChatFormat, parser: str) -> tuple[ToolAnswers, bool]:
    """Return how answers are read, and whether their text must show special tokens.

    INVALID_ARGUMENT TOOLS_NOT_SUPPORTED where the model's template or the server has no support. Blocking.
    """
    check_template(chat_format)
    if asked.choice == "auto" and not parser:
        raise invalid_argument("TOOLS_NOT_SUPPORTED", _NO_PARSER, tool_choice=_NO_PARSER)

    def reader() -> ToolReader:
        return ToolReader(parser, chat_format.tokenizer, asked.tools)

    return ToolAnswers(asked, reader), asked.choice == "auto" and reader().needs_special_tokens


def check_template(chat_format: ChatFormat) -> None:
    """Raise INVALID_ARGUMENT TOOLS_NOT_SUPPORTED unless the model's template shows tools. Blocking."""
    if not chat_format.shows_tools:
        raise invalid_argument("TOOLS_NOT_SUPPORTED", _NO_TEMPLATE, tools=_NO_TEMPLATE)


def _calls(found: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"chatcmpl-tool-{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for name, arguments in found
    ]
