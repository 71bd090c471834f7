"""Log-probabilities in OpenAI's two shapes: of chats by token, of completions in parallel lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from loraline.inference.engines.port import TokenLogprob


class Logprobs:
    """Writes the figures of one response; completions count where in the text each token begins."""

    def __init__(self, kind: Literal["chat", "completion"], most: int | None):
        self._kind = kind
        self._most = most
        self._offsets: dict[int, int] = {}

    def of(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Return the figures of an answer's next tokens; None where none were asked for."""
        if self._most is None:
            return None
        if self._kind == "chat":
            content = [
                {**_entry(one.token, one.logprob), "top_logprobs": [_entry(*pair) for pair in one.top[: self._most]]}
                for one in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [one.token for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [dict(one.top[: self._most]) for one in tokens] if self._most else None,
            "text_offset": [self._offset(index, one.token) for one in tokens],
        }

    def _offset(self, index: int, token: str) -> int:
        begin = self._offsets.get(index, 0)
        self._offsets[index] = begin + len(token)
        return begin


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
