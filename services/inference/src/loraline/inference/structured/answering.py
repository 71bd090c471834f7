"""Whole answers and streamed ones, checked before their end is told, and asked for again as a question allows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import structlog

from loraline.core.errors import LoralineError
from loraline.inference.engines.port import Piece
from loraline.inference.generation import Answer, Generation, Question

_log = structlog.get_logger(__name__)
RETRIED = frozenset({"STRUCTURED_ANSWER_CUT", "STRUCTURED_ANSWER_INVALID", "LANGUAGE_MISMATCH"})
"""Reasons of answers that another try may mend."""


async def whole(generation: Generation, question: Question) -> Answer:
    """Return a finished answer that is what was asked, after at most `question.retries` further tries."""
    for attempt in range(question.retries + 1):
        try:
            async with generation.answer(again(question, attempt)) as answer:
                async with aclosing(answer.pieces()) as pieces:
                    async for _ in pieces:
                        pass
                answer.check_shape()
                await answer.keep()
                return answer
        except LoralineError as error:
            if not tried_again(generation, question, attempt, error):
                raise
    raise AssertionError("the last attempt returns or raises")


async def streamed(
    generation: Generation, question: Question, *, held: bool = False
) -> AsyncGenerator[tuple[Answer, Piece], None]:
    """Yield the pieces of an answer as they come; its last piece only when the whole is what was asked.

    With retries, or when `held` says so, the pieces are held until then: what was sent cannot be taken back.
    """
    if held or (question.retries and question.shaped):
        answer = await whole(generation, question)
        for piece in answer.held():
            yield answer, piece
        return
    async with generation.answer(question) as answer, aclosing(answer.pieces()) as pieces:
        async for piece in pieces:
            if piece.finish_reason and answer.ended:
                answer.check_shape()
                await answer.keep()
            yield answer, piece


def tried_again(generation: Generation, question: Question, attempt: int, error: LoralineError) -> bool:
    """Tell whether a failed answer is to be asked for again; a greedy one would come out the same."""
    again = error.reason in RETRIED and attempt < question.retries and question.sampling.temperature > 0
    if again:
        generation.metrics.structured_retries.labels(reason=error.reason).inc()
        _log.info("answer_asked_again", reason=error.reason, attempt=attempt + 1, why=error.message)
    return again


def again(question: Question, attempt: int) -> Question:
    """Return the question with another seed at each further try: the same would give the same answer."""
    seed = question.sampling.seed
    if seed is None or not attempt:
        return question
    return replace(question, sampling=replace(question.sampling, seed=seed + attempt))
