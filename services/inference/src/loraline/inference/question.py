"""What a client asks, whichever way it came in, and the figures of what it got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraline.inference.engines.port import Constraint, Sampling, TokenLogprob


@dataclass(frozen=True)
class Question:
    """What a client asks, whichever way it came in."""

    model: str
    sampling: Sampling
    prompt: str | Sequence[int] = ""
    """A text or token ids to continue; used when there are no messages."""
    messages: Sequence[dict[str, Any]] = ()
    """`role` and `content`, and of tools `tool_calls` and `tool_call_id`, as chat templates read them."""
    tools: Sequence[dict[str, Any]] = ()
    """Tools that the chat template shows the model."""
    constraint: Constraint | None = None
    shape_field: str = ""
    """How the request calls the constraint, for refusals; its name in the proto when empty."""
    language: str = ""
    """`ko`, `zh`, `en`, or `question` to follow the last user message's; empty for no rule."""
    forbid: tuple[str, ...] = ()
    """What the answer's texts may not hold, as language.rules.FORBIDDABLE names it."""
    retries: int = 0
    """Further tries for an answer that is not of the shape asked."""
    cut_is_error: bool = True
    """Whether a shaped answer cut at its limit is an error, not an answer whose finish reason says so."""
    session: str = ""
    """Session that the messages are a turn of; empty for none."""
    lead: Sequence[dict[str, str]] = ()
    """System prompt of the session, before all that was said."""
    earlier: Sequence[Sequence[dict[str, str]]] = ()
    """Earlier turns of the session; the oldest are left out where the window has no room for all."""

    @property
    def shaped(self) -> bool:
        """Whether anything is asked of the answer's shape or language."""
        return self.constraint is not None or bool(self.language or self.forbid)

    @property
    def spoken(self) -> str:
        """What was asked in words: the last user message, or the prompt."""
        said = (message["content"] for message in reversed(self.messages) if message["role"] == "user")
        return next(said, "") if self.messages else self.prompt if isinstance(self.prompt, str) else ""


@dataclass
class Figures:
    """Counts and times of an answer; complete after its last piece."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: dict[int, str] = field(default_factory=dict)
    """Answer's index -> `stop` or `length`."""
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    texts: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    """By answer's index; empty unless asked for."""

    def text(self, index: int = 0) -> str:
        """Return an answer's text so far."""
        return "".join(self.texts.get(index, ()))
