"""What is sent to the model: one request for N items, drawn from the recipe's seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraline.datagen.llms.recipes import Recipe
from loraline.datagen.llms.texts import TextStore
from loraline.datagen.quality.settings import LANGUAGES, NO_PROMISE, PROMISES, Forbidden, Language

WRAPPER = "items"
EVOLUTIONS = (
    "add one more constraint or requirement", "ask for more depth and breadth in the same matter",
    "replace a general idea by a more specific one", "make it need several steps of reasoning",
    "put it into a concrete situation with real-world details",
    "write a quite new one of the same field and difficulty that is rarer",
)  # fmt: skip
FORBIDDEN_WORDS: Mapping[Forbidden, str] = {
    "latin": "Latin letters", "digits": "digits", "emoji": "emoji", "markdown": "markdown",
}  # fmt: skip
SHOWN = 8
"""Instructions that self-instruct shows in a request."""


@dataclass(frozen=True)
class LlmSettings:
    """A checked LLM recipe; the meanings are those of LlmRecipe in the contract."""

    recipe: Recipe
    rows: int
    batch_size: int = 10
    temperature: float = 0.8
    system_prompt: str = ""
    brief: str = ""
    topics: Sequence[str] = ()
    personas: Sequence[str] = ()
    styles: Sequence[str] = ()
    few_shots: Sequence[tuple[str, str]] = ()
    quota_policy: Literal["pause", "wait"] = "pause"
    max_wait_seconds: float = 3600.0
    max_candidates_ratio: float = 3.0
    timeout_seconds: float = 120.0
    max_tokens: int = 0
    max_cost_usd: float = 0.0
    language: Language = ""
    kind: str = ""
    forbid: frozenset[Forbidden] = frozenset()
    texts: TextStore | None = None
    longest_text: int = 0

    @property
    def row_kind(self) -> str:
        """The kind of the rows."""
        return self.kind or self.recipe.name

    @property
    def rules(self) -> list[str]:
        """What rows must keep, in words."""
        promise = PROMISES.get(self.row_kind, NO_PROMISE)
        longest = self.longest_text or promise.max_characters
        forbidden = sorted(self.forbid | promise.forbidden(self.language))
        rules = [f"Write everything that people say in {LANGUAGES[self.language]}."] if self.language else []
        if longest:
            what = "No text in an answer" if promise.each_text else "No answer"
            rules.append(f"{what} is longer than {longest} characters.")
        if forbidden:
            rules.append(f"Answers hold none of these: {', '.join(FORBIDDEN_WORDS[name] for name in forbidden)}.")
        return rules

    @property
    def tries_of_a_text(self) -> int:
        """How often one text may be read."""
        return max(1, min(255, math.ceil(self.max_candidates_ratio)))

    @property
    def budget(self) -> int:
        """Candidates that may be asked for in all."""
        return max(self.rows, math.ceil(self.rows * self.max_candidates_ratio))


class Prompter:
    """Writes request bodies: the same bytes for the same arguments. What does not change is written once."""

    def __init__(self, settings: LlmSettings, seed: int):
        self._settings, self._seed = settings, seed
        self._combinations = [("Topic", settings.topics), ("Who asks", settings.personas), ("Style", settings.styles)]
        total = math.prod(len(values) or 1 for _, values in self._combinations)
        draw = int.from_bytes(hashlib.sha256(f"llm:{seed}".encode()).digest()[:8])
        self._first, self._step = draw % total, _coprime(draw >> 20, total)
        self._brief = [*([settings.brief] if settings.brief else []), *settings.rules]
        self._shots = [f"Example of a user turn: {prompt}\nExample of its answer: {response}"
                       for prompt, response in settings.few_shots]  # fmt: skip
        self._schema = json.dumps(settings.recipe.item_schema, ensure_ascii=False)
        system = settings.system_prompt or settings.recipe.system_prompt
        self._before = f'"messages": [{{"role": "system", "content": {_json(system)}}}, {{"role": "user", "content": '
        rest: dict[str, Any] = {"temperature": settings.temperature}
        if settings.max_tokens:
            rest["max_tokens"] = settings.max_tokens
        self._after = {False: _json(rest)[1:], True: _json({**rest, "response_format": _format(settings.recipe)})[1:]}

    @property
    def plan(self) -> str:
        """What decides the requests of all calls, sizes and response_format aside: equal plans ask the same things."""
        recipe = self._settings.recipe
        seeds = [list(values) for _, values in self._combinations]
        texts = self._settings.texts
        return _json([self._seed, recipe.name, recipe.context, texts.digest if texts else "", self._brief, seeds,
                      self._shots, self._schema, self._before, self._after[False]])  # fmt: skip

    def body(self, model: str, call: int, size: int, *, structured: bool, context: Sequence[str] = ()) -> bytes:
        """Return the body of call number `call` for `size` items; `context` are instructions to show or to rewrite."""
        question = self.question(call, size, context)
        text = f'{{"model": {_json(model)}, {self._before}{_json(question)}}}], {self._after[structured]}'
        return text.encode("utf-8", "replace")

    def question(self, call: int, size: int, context: Sequence[str] = ()) -> str:
        """Return the user turn of a request."""
        parts = [*self._brief, *self._drawn(call), *self._shots]
        mode = self._settings.recipe.context
        if mode == "text":
            return "\n\n".join([*self._brief, *self._shots, self._about_text(*context)])
        if mode == "examples" and context:
            shown = "\n".join(f"- {text}" for text in context)
            parts.append(f"Instructions that exist already. Write others, of different kinds:\n{shown}")
        elif mode == "evolve" and context:
            way = EVOLUTIONS[(self._seed + call) % len(EVOLUTIONS)]
            shown = "\n".join(f"{number}. {text}" for number, text in enumerate(context, start=1))
            parts.append(f"Rewrite each of these instructions into a new, harder one: {way}.\n{shown}")
        parts.append(
            f"Write {size} different item{'s' if size != 1 else ''}. This is batch {call + 1}; its items differ from "
            f'those of other batches. Answer with one JSON object {{"{WRAPPER}": [...]}} and nothing else. Each item '
            f"fits this JSON schema:\n{self._schema}"
        )
        return "\n\n".join(parts)

    def _about_text(self, text: str = "", again: str = "") -> str:
        return (
            f"Text:\n{text}\n\nWrite 1 item: what this text says{f' ({again})' if again else ''}. Answer with one JSON "
            f'object {{"{WRAPPER}": [...]}} and nothing else. The item fits this JSON schema:\n{self._schema}'
        )

    def _drawn(self, call: int) -> list[str]:
        """Return the seeds of a call. All combinations come before one comes again, in an order of the run's seed."""
        place = self._first + call * self._step
        drawn = []
        for label, values in self._combinations:
            if values:
                place, index = divmod(place, len(values))
                drawn.append(f"{label}: {values[index]}")
        return drawn


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _coprime(start: int, total: int) -> int:
    """Return a step that visits all of `total` places before it comes back to the first."""
    step = start % total or 1
    while math.gcd(step, total) != 1:
        step += 1
    return step


def _format(recipe: Recipe) -> Mapping[str, Any]:
    item = dict(recipe.item_schema)
    schema = {
        # References such as #/$defs/… are looked up from the top.
        **{name: item.pop(name) for name in ("$defs", "definitions") if name in item},
        "type": "object",
        # At least one: a weak model takes the shortest way out that the schema leaves, an empty list.
        "properties": {WRAPPER: {"type": "array", "minItems": 1, "items": item}},
        "required": [WRAPPER],
        "additionalProperties": False,
    }
    name = recipe.name.replace("-", "_")
    return {"type": "json_schema", "json_schema": {"name": name, "strict": recipe.strict_schema, "schema": schema}}
