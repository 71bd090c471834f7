"""Answers in OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from loraline.inference.engines.port import Piece
from loraline.inference.generation import Answer, Figures
from loraline.inference.http.logprobs import Logprobs
from loraline.inference.http.tool_answers import ToolAnswers

Kind = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"


class Shape:
    """Builds the objects of one response: the same id, time and model in all of them."""

    def __init__(
        self,
        kind: Kind,
        answer: Answer,
        *,
        include_usage: bool,
        tools: ToolAnswers | None = None,
        logprobs: int | None = None,
    ):
        self._kind = kind
        self._answer = answer
        self._tools = tools
        self._logprobs = Logprobs(kind, logprobs)
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._frame = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": answer.model,
        }

    def whole(self) -> dict[str, Any]:
        """Return the whole response; after the last piece."""
        figures = self._answer.figures
        choices = [self._choice(index, figures.text(index), reason) for index, reason in sorted(figures.finish.items())]
        name = "chat.completion" if self._kind == "chat" else "text_completion"
        body = {**self._frame, "object": name, "choices": choices, "usage": usage(figures)}
        notices = self._answer.notices
        return {**body, "notices": notices} if notices else body

    def piece(self, piece: Piece) -> dict[str, Any] | None:
        """Return a piece's event; None when it says nothing that a client could show."""
        first = piece.index not in self._begun
        said, reason = self._said(piece)
        if not (any(said.values()) or piece.logprobs or reason or first):
            return None
        self._begun.add(piece.index)
        choice: dict[str, Any] = {
            "index": piece.index,
            "finish_reason": reason or None,
            "logprobs": self._logprobs.of(piece.index, piece.logprobs),
        }
        if self._kind == "chat":
            choice["delta"] = {"role": "assistant", **said} if first else said
        else:
            choice["text"] = piece.text
        event = self._event([choice])
        if piece.finish_reason and (notices := self._answer.notices):
            event["notices"] = notices
        return event

    def last(self) -> dict[str, Any] | None:
        """Return the event with the usage, when it was asked for."""
        return {**self._event([]), "usage": usage(self._answer.figures)} if self._include_usage else None

    def _said(self, piece: Piece) -> tuple[dict[str, Any], str]:
        """Return what a piece adds to a chat's answer, and its finish reason."""
        return self._tools.delta(piece) if self._tools else ({"content": piece.text}, piece.finish_reason)

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        event = {**self._frame, "object": name, "choices": choices}
        return {**event, "usage": None} if self._include_usage else event

    def _choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        told = self._logprobs.of(index, self._answer.figures.logprobs.get(index, ()))
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": told}
        if self._kind == "completion":
            return {**choice, "text": text}
        if self._tools is None:
            return {**choice, "message": {"role": "assistant", "content": text, "refusal": None}}
        message, reason = self._tools.message(text, reason)
        return {**choice, "message": message, "finish_reason": reason}


def usage(figures: Figures) -> dict[str, int]:
    """Return token counts."""
    return {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "total_tokens": figures.prompt_tokens + figures.completion_tokens,
    }


def event(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
