"""Why an answer is empty, cut or of no use, in words that say what to change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraline.inference.structured.shape import texts_of

_FEW_TOKENS = 4
"""A plain prompt of fewer tokens names no context that a model could go on from."""


@dataclass(frozen=True)
class Circumstances:
    """What an answer was made under."""

    prompt_tokens: int
    max_tokens: int
    """The limit in force."""
    asked_tokens: int
    """The limit that was asked for; more than max_tokens where the window ended first."""
    ceiling: int
    """Most tokens that this prompt's answer could have here."""
    window: int
    plain_prompt: bool
    """Whether it was a text to continue, not a conversation."""
    has_template: bool
    stop_texts: bool
    is_json: bool

    @property
    def larger(self) -> int:
        """The max_tokens to try next; 0 when there can be no more."""
        return min(self.max_tokens * 2, self.ceiling) if self.max_tokens < self.ceiling else 0


def notices_of(made: Circumstances, texts: Mapping[int, str], finish: Mapping[int, str]) -> list[str]:
    """Return what people should know about answers, by their texts and finish reasons."""
    found = list(_cut(made)) if "length" in finish.values() else []
    for index in sorted(finish):
        which = f"Answer {index}" if len(finish) > 1 else "The answer"
        if not texts[index].strip():
            found += _empty(made, which, finish[index])
        elif made.is_json and _says_nothing(texts[index]):
            found.append(f"{which} has the shape that was asked but no content: all its texts are empty.")
    return found


def _cut(made: Circumstances) -> Iterator[str]:
    if made.max_tokens < made.asked_tokens:
        yield (
            f"The answer was cut where the context window of {made.window} tokens ends; the prompt takes "
            f"{made.prompt_tokens} of them. Shorten the conversation."
        )
    elif made.larger:
        yield f"The answer was cut at max_tokens={made.max_tokens}. Ask again with max_tokens={made.larger}."
    else:
        yield f"The answer was cut at max_tokens={made.max_tokens}, which is the most that this server allows here."


def _empty(made: Circumstances, which: str, finish: str) -> Iterator[str]:
    if finish == "length":
        yield (
            f"{which} is empty: all its tokens are whitespace or special tokens. Is this the format it was trained on?"
        )
    else:
        stopped = "; a stop text may also have come first." if made.stop_texts else "."
        yield (
            f"{which} is empty: the model ended it at once. Check that the prompt ends with a question, and that the "
            f"template is the one it was trained with{stopped}"
        )
    if made.plain_prompt and made.prompt_tokens < _FEW_TOKENS:
        yield f"The prompt has {made.prompt_tokens} token(s) and no context; say what the answer is to be about."
    if made.plain_prompt and made.has_template:
        yield "The model has a chat template, and a plain prompt goes without it; send messages (Chat) instead."
    elif made.plain_prompt:
        yield "The model has no chat template; write the prompt in the form that it was trained on."


def _says_nothing(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    texts = list(texts_of(value))
    return value in ({}, []) or (bool(texts) and not any(part.strip() for part in texts))
