"""The built-in recipes: what a model is asked for, the schema of one item, and the row that an item becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from loraline.core.errors import invalid_argument, not_found
from loraline.datagen.convert.shapes import PairShape, ShapeError, parse, recognise
from loraline.datagen.llms.schemas import bad_schema, compiled
from loraline.datagen.rows import RowFormat, conversation

Messages = list[dict[str, str]]
TEXT = {"type": "string", "minLength": 1}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A way of asking a model for rows. `to_messages` turns an item that fits the schema into a row's messages.

    `context` says what a request shows of the few-shot prompts and of the rows made so far: `examples` to write others
    than these, `evolve` to make harder ones of them, nothing otherwise.
    """

    name: str
    description: str
    system_prompt: str
    item_schema: Mapping[str, Any]
    to_messages: Callable[[Mapping[str, Any]], Messages]
    format: RowFormat = "text"
    strict_schema: bool = True
    context: Literal["", "examples", "evolve"] = ""


def _instruction(item: Mapping[str, Any]) -> Messages:
    return conversation(item["instruction"].strip(), item["response"].strip())


def _dialogue(item: Mapping[str, Any]) -> Messages:
    turns = [conversation(turn["user"].strip(), turn["assistant"].strip()) for turn in item["turns"]]
    return [message for turn in turns for message in turn]


def _json_answer(question: str, *answer: str) -> Callable[[Mapping[str, Any]], Messages]:
    def to_messages(item: Mapping[str, Any]) -> Messages:
        value = item[answer[0]] if len(answer) == 1 else {name: item[name] for name in answer}
        return conversation(item[question].strip(), json.dumps(value, ensure_ascii=False))

    return to_messages


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "instruction-response",
            "Instructions of many kinds and good answers to them.",
            "You write training data for an assistant. Each item is one instruction that a person could give and the "
            "best answer to it. Instructions differ in task, length and wording; answers are complete and correct.",
            _object(instruction=TEXT, response=TEXT),
            _instruction,
        ),
        Recipe(
            "persona-dialogue",
            "Short conversations of a user with one character, always in the character's voice.",
            "You write conversations between a user and a character. The character never leaves its role, its way of "
            "speaking and its knowledge; the user speaks plainly and asks about different things. Each item is one "
            "conversation of one to four turns.",
            _object(turns={"type": "array", "minItems": 1, "maxItems": 8, "items": _object(user=TEXT, assistant=TEXT)}),
            _dialogue,
        ),
        Recipe(
            "commands",
            "Natural language, and the one JSON command that it means.",
            "You write training data for a system that turns what people say into commands. Each item has a sentence "
            "as a person would say it and the one JSON object that it means. Use the commands and fields that the "
            "brief describes, and no others.",
            _object(text=TEXT, command={"type": "object", "minProperties": 1}),
            _json_answer("text", "command"),
            "json",
            strict_schema=False,
        ),
        Recipe(
            "recommendation",
            "A person's situation, and a recommendation with challenges to take up.",
            "You write training data for an adviser. Each item has a person's request, a short warm recommendation of "
            "at most 100 characters, and one to three challenges, each with a title and a description.",
            _object(
                request=TEXT,
                recommend=TEXT,
                challenges={
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 5,
                    "items": _object(title=TEXT, description=TEXT),
                },
            ),
            _json_answer("request", "recommend", "challenges"),
            "json",
        ),
        Recipe(
            "extraction",
            "Text or HTML, and the facts in it as one JSON object.",
            "You write training data for a system that reads facts out of text. Each item has a realistic text or "
            "piece of HTML and the JSON object of the facts in it, with the fields that the brief describes. Nothing "
            "that the text does not say stands in the object.",
            _object(text=TEXT, record={"type": "object", "minProperties": 1}),
            _json_answer("text", "record"),
            "json",
            strict_schema=False,
        ),
        Recipe(
            "self-instruct",
            "From a few instructions of yours to many of other kinds, each unlike those before it.",
            "You extend a set of tasks for an assistant. Each item is one new instruction and the best answer to it. "
            "New instructions differ from those shown in task, field, length and form; the answers are complete and "
            "correct.",
            _object(instruction=TEXT, response=TEXT),
            _instruction,
            context="examples",
        ),
        Recipe(
            "evol-instruct",
            "Your instructions, step by step made harder, deeper or rarer, with answers.",
            "You make instructions for an assistant harder. Each item is one rewritten instruction that a person can "
            "understand and an assistant can answer from the text alone, and the best answer to it. The rewriting adds "
            "at most twenty words and never mentions the old instruction.",
            _object(instruction=TEXT, response=TEXT),
            _instruction,
            context="evolve",
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """Return the built-in recipe; NOT_FOUND names those there are."""
    recipe = RECIPES.get(name)
    if recipe is None:
        there = f"There is no recipe {name!r}; there are {', '.join(RECIPES)}."
        raise not_found("RECIPE_NOT_FOUND", there, recipe=name)
    return recipe


def with_schema(recipe: Recipe, schema: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the caller's schema of one item; its fields must have one of the shapes convert knows."""
    compiled(schema)
    properties = schema.get("properties")
    shape = recognise({name: [] for name in properties}) if isinstance(properties, Mapping) else None
    if shape is None:
        raise bad_schema("its properties are of no known shape, such as prompt/completion, input/output or messages")
    name = shape.name if isinstance(shape, PairShape) else shape
    return replace(
        recipe, description=f"{recipe.description} ({name})", item_schema=schema, to_messages=_by_shape,
        strict_schema=False,
    )  # fmt: skip


def check_context(recipe: Recipe, few_shots: int, field: str) -> None:
    """INVALID_ARGUMENT when the recipe works on given instructions and there are none."""
    if recipe.context and not few_shots:
        raise invalid_argument(
            "FEW_SHOTS_MISSING", f"The recipe {recipe.name} starts from instructions of yours: put some into "
            f"{field}.few_shots.", **{f"{field}.few_shots": "missing"},
        )  # fmt: skip


def _by_shape(item: Mapping[str, Any]) -> Messages:
    return [{"role": role, "content": text} for role, text in parse(item).turns]


ItemError = ShapeError
