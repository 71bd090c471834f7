"""A profile's answer as events: each item once it is complete, then the validated whole."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from loraline.core.errors import LoralineError
from loraline.inference.engines.port import Constraint
from loraline.inference.generation import Answer, Generation
from loraline.inference.profiles.items import ItemScanner
from loraline.inference.profiles.profile import Profile
from loraline.inference.question import Question
from loraline.inference.structured.answering import again, tried_again, whole
from loraline.inference.structured.shape import AnswerShape, shape_of
from loraline.inference.structured.verdict import failure


@dataclass(frozen=True)
class Event:
    """A named event and its content."""

    name: str
    data: Any


async def answer_whole(generation: Generation, profile: Profile, question: Question) -> dict[str, Any]:
    """Return a profile's validated answer with its figures."""
    async with counted(generation, profile.name):
        answer = await whole(generation, question)
    return {"profile": profile.name, "answer": json.loads(answer.figures.text()), **figures_of(answer)}


async def events(generation: Generation, profile: Profile, question: Question) -> AsyncGenerator[Event, None]:
    """Yield an event for each item of the streamed field, then `figures` and `close` with the whole.

    An answer that fails is asked for again only while none of its items was sent: they cannot be taken back.
    """
    async with counted(generation, profile.name):
        for attempt in range(question.retries + 1):
            sent = 0
            try:
                async with aclosing(_attempt(generation, profile, again(question, attempt))) as found:
                    async for event in found:
                        yield event
                        sent += 1
                return
            except LoralineError as error:
                if sent or not tried_again(generation, question, attempt, error):
                    raise


async def _attempt(generation: Generation, profile: Profile, question: Question) -> AsyncGenerator[Event, None]:
    scanner = ItemScanner(profile.stream.field) if profile.stream else None
    async with generation.answer(question) as answer, aclosing(answer.pieces()) as pieces:
        shape = _item_shape(profile, answer.shape)
        async for piece in pieces:
            for item in scanner.feed(piece.text) if scanner else ():
                _check_item(shape, item)
                yield Event(profile.stream.event if profile.stream else "", item)
        answer.check_shape()
        await answer.keep()
        yield Event("figures", figures_of(answer))
        yield Event("close", json.loads(answer.figures.text()))


def figures_of(answer: Answer) -> dict[str, Any]:
    """Return who answered, how long the answer is, and what people should know about it."""
    figures = answer.figures
    return {
        "model": answer.model,
        "usage": {
            "prompt_tokens": figures.prompt_tokens,
            "completion_tokens": figures.completion_tokens,
            "total_tokens": figures.prompt_tokens + figures.completion_tokens,
        },
        "notices": answer.notices,
    }


@asynccontextmanager
async def counted(generation: Generation, profile: str) -> AsyncIterator[None]:
    """Count an answer of the profile by how it ends, whichever way it was asked for."""
    outcome = "ok"
    try:
        yield
    except LoralineError as error:
        outcome = error.reason
        raise
    except BaseException as error:
        outcome = "INTERNAL" if isinstance(error, Exception) else "cancelled"
        raise
    finally:
        generation.metrics.profile_answers.labels(profile=profile, outcome=outcome).inc()


def _item_shape(profile: Profile, shape: AnswerShape | None) -> AnswerShape | None:
    """Return what one item is held to: its part of the profile's schema, and the answer's language rule."""
    if profile.stream is None or shape is None:
        return None
    items = profile.answer["properties"][profile.stream.field].get("items") or {}
    schema = {**items, **{name: profile.answer[name] for name in ("$defs", "definitions") if name in profile.answer}}
    return shape_of(Constraint("json_schema", schema), shape.rule, "answer")


def _check_item(shape: AnswerShape | None, item: Any) -> None:
    if shape is not None and (error := failure(shape, json.dumps(item), "stop", 0, 0)) is not None:
        raise error
