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

ItemError = ShapeError
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
    context: Literal["", "examples", "evolve", "text"] = ""
    requires: tuple[str, ...] = ()
    profits_from: tuple[str, ...] = ("brief", "topics", "personas", "styles")
    schema_is_own: bool = False

    def row_of(self, item: Mapping[str, Any], text: str = "") -> tuple[Messages, RowFormat]:
        """Return an item's messages and how its answer is written; ItemError for one that makes no row.

        `text` is the caller's that the item was read out of, for recipes whose context is `text`.
        """
        if self.context == "text":
            return conversation(text, json.dumps(item["record"], ensure_ascii=False)), self.format
        if self.schema_is_own and not _has_fields(item, self.own_fields):
            found = parse(item)
            return [{"role": role, "content": said} for role, said in found.turns], found.format
        return self.to_messages(item), self.format

    @property
    def extends(self) -> bool:
        """Whether items are instructions that grow out of those given and made before."""
        return self.context in ("examples", "evolve")

    @property
    def own_fields(self) -> frozenset[str]:
        """The fields that items of the built-in recipe have."""
        return frozenset(RECIPES[self.name].item_schema["properties"])


def _has_fields(item: Mapping[str, Any], fields: frozenset[str]) -> bool:
    return fields <= item.keys()


def _said(item: Any, name: str) -> str:
    """Return a text of an item; its schema may be the caller's, so it may be anything."""
    value = item.get(name) if isinstance(item, Mapping) else None
    if not isinstance(value, str):
        raise ItemError("CONTENT_NOT_TEXT", f"{name!r} is no text.", "Ask for text")
    return value.strip()


def _instruction(item: Mapping[str, Any]) -> Messages:
    return conversation(_said(item, "instruction"), _said(item, "response"))


def _dialogue(item: Mapping[str, Any]) -> Messages:
    spoken = item["turns"] if isinstance(item["turns"], list) else []
    turns = [conversation(_said(turn, "user"), _said(turn, "assistant")) for turn in spoken]
    return [message for turn in turns for message in turn]


def _json_answer(question: str, *answer: str) -> Callable[[Mapping[str, Any]], Messages]:
    def to_messages(item: Mapping[str, Any]) -> Messages:
        value = item[answer[0]] if len(answer) == 1 else {name: item[name] for name in answer}
        return conversation(_said(item, question), json.dumps(value, ensure_ascii=False))

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
            profits_from=("brief", "item_schema", "few_shots", "topics", "personas", "styles"),
        ),
        Recipe(
            "recommendation",
            "A person's situation, and a recommendation with challenges to take up.",
            "You write training data for an adviser. Each item has a person's request, a short warm recommendation, "
            "and one to three challenges, each with a title and a description, in plain text without markdown.",
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
            profits_from=("texts", "item_schema", "brief", "topics"),
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
            requires=("few_shots",),
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
            requires=("few_shots",),
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
    """Return the recipe with the caller's schema of one item.

    Its fields are those of the recipe's own items, or have one of the shapes convert knows; then rows are written as
    convert would write them.
    """
    compiled(schema)
    own = replace(recipe, item_schema=schema, strict_schema=False, schema_is_own=True)
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        raise bad_schema("it names no properties")
    if _has_fields(properties, recipe.own_fields):
        return own
    shape = recognise({name: [] for name in properties})
    if shape is None:
        fields = ", ".join(sorted(recipe.own_fields))
        raise bad_schema(
            f"its properties are neither those of the recipe ({fields}) nor of a known shape, such as "
            "prompt/completion, input/output or messages"
        )
    name = shape.name if isinstance(shape, PairShape) else shape
    return replace(own, description=f"{recipe.description} ({name})")


def reading(recipe: Recipe, record: Mapping[str, Any] | None) -> Recipe:
    """Return the recipe for texts of the caller's: one record an item, by the schema given or any object."""
    if record is not None:
        compiled(record)
    schema = dict(record or {"type": "object", "minProperties": 1})
    definitions = {name: schema.pop(name) for name in ("$defs", "definitions") if name in schema}
    prompt = (
        "You read facts out of text. The item has the one JSON object of the facts in the text that is given, with the "
        "fields that its schema and the brief describe. Nothing that the text does not say stands in the object."
    )
    item_schema = {**_object(record=schema), **definitions}
    return replace(recipe, system_prompt=prompt, item_schema=item_schema, strict_schema=False, context="text")


def check_context(recipe: Recipe, few_shots: int, field: str) -> None:
    """INVALID_ARGUMENT when the recipe works on given instructions and there are none."""
    if "few_shots" in recipe.requires and not few_shots:
        raise invalid_argument(
            "FEW_SHOTS_MISSING", f"The recipe {recipe.name} starts from instructions of yours: put some into "
            f"{field}.few_shots.", **{f"{field}.few_shots": "missing"},
        )  # fmt: skip
