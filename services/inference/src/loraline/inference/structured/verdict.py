"""What a finished answer is told when it is not what was asked: typed, with what to do."""

from __future__ import annotations

import grpc

from loraline.core.errors import LoralineError
from loraline.inference.structured.shape import AnswerShape


def failure(shape: AnswerShape, text: str, finish: str, max_tokens: int, larger: int) -> LoralineError | None:
    """Return the error of an answer in a shape, or None when it is right.

    `larger` is the max_tokens to try next, 0 when the server or the window allows no more. An answer that reached its
    limit just where it was complete is right.
    """
    problem = shape.problem(text)
    may_be_whole = shape.asked is not None and shape.asked.kind != "grammar"
    if finish == "length" and not (may_be_whole and problem is None):
        return _cut(shape, max_tokens, larger)
    if problem is None:
        return None
    reason, why = problem
    metadata = {"shape": shape.name, "why": why}
    if reason == "LANGUAGE_MISMATCH":
        message = f"The answer breaks the language rule: {why}. Ask again, or allow it."
        return LoralineError(grpc.StatusCode.OUT_OF_RANGE, reason, message, metadata=metadata)
    message = f"The answer is not of the shape that was asked ({shape.name}): {why}. Ask again, or set retries."
    return LoralineError(grpc.StatusCode.INTERNAL, reason, message, metadata=metadata)


def _cut(shape: AnswerShape, max_tokens: int, larger: int) -> LoralineError:
    more = (
        f"Ask again with max_tokens={larger}, or with a smaller shape."
        if larger
        else ("The server allows no more: ask for a smaller shape, or shorten the prompt.")
    )
    message = f"The answer was cut at max_tokens={max_tokens} before it was complete. {more}"
    metadata = {"shape": shape.name, "max_tokens": str(max_tokens)}
    if larger:
        metadata["try_max_tokens"] = str(larger)
    return LoralineError(grpc.StatusCode.OUT_OF_RANGE, "STRUCTURED_ANSWER_CUT", message, metadata=metadata)
