"""vLLM's parsers of tool calls: models write calls as text, each family in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from loraline.core.errors import failed_precondition


def check_parser(name: str) -> None:
    """Raise FAILED_PRECONDITION TOOL_PARSER_UNKNOWN unless vLLM has a parser of that name. Blocking: imports vLLM."""
    if name:
        _parser_class(name)


class ToolReader:
    """Reads one answer: its text, and the calls in it. Not to be used for another."""

    def __init__(self, parser: str, tokenizer: Any, tools: Sequence[dict[str, Any]]):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model="", messages=[], tools=list(tools), tool_choice="auto")  # type: ignore[arg-type]
        self._parser = _parser_class(parser)(tokenizer, request.tools)
        self._request: Any = self._parser.adjust_request(request)
        self._text = ""
        self._ids: list[int] = []
        self._told = 0

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the answer's text must show special tokens for the calls to be found."""
        return not self._request.skip_special_tokens

    def whole(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        """Return the text around the calls, and each call's name and arguments (JSON)."""
        found = self._parser.extract_tool_calls(text, self._request)
        calls = [(call.function.name, call.function.arguments) for call in found.tool_calls]
        return found.content or "", calls

    def more(self, text: str, ids: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
        """Take the next piece of a streamed answer; return what of it is text, and OpenAI's deltas of calls."""
        before, before_ids = self._text, self._ids
        self._text, self._ids = before + text, [*before_ids, *ids]
        delta = self._parser.extract_tool_calls_streaming(
            before, self._text, text, before_ids, self._ids, ids, self._request
        )
        if delta is None:
            return "", []
        self._told += len(delta.content or "")
        return delta.content or "", [call.model_dump(exclude_none=True) for call in delta.tool_calls or ()]

    def rest(self) -> str:
        """Return the text that was held back because a call might have begun; after the last piece."""
        content, calls = self.whole(self._text)
        return "" if calls else content[self._told :]


def _parser_class(name: str) -> Any:
    if find_spec("vllm") is None:
        message = f"LORALINE_INFERENCE_TOOL_PARSER is {name!r}, but the parsers are vLLM's, which is not installed."
        raise failed_precondition("TOOL_PARSER_UNKNOWN", message)
    from vllm.tool_parsers import ToolParserManager

    try:
        return ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = sorted({*ToolParserManager.tool_parsers, *ToolParserManager.lazy_parsers})
        message = f"LORALINE_INFERENCE_TOOL_PARSER is {name!r}; vLLM has {', '.join(known)}."
        raise failed_precondition("TOOL_PARSER_UNKNOWN", message) from None
