"""Draws rows: weighted, all different, the same for the same seed."""

from __future__ import annotations

import json
import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, Literal

from loraline.core.errors import LoralineError, failed_precondition
from loraline.datagen.digest_set import DigestSet
from loraline.datagen.rows import Row, conversation, row_digest
from loraline.datagen.template.places import fill

TemplateFormat = Literal["newline", "json"]
Known = Callable[[list[dict[str, str]]], bool]
WEIGHTED_TRIES = 32
UNIFORM_TRIES = 64


@dataclass(frozen=True)
class Weighted:
    """Values and how often each is drawn relative to the others."""

    values: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Template:
    """One wording of a user turn and its answer in one or both formats.

    `responses` are the wordings of the answer in lines; `pools` are the names of the places, sorted; `number` is the
    recipe's template that this is a wording of.
    """

    prompt: str
    responses: tuple[str, ...]
    response_json: Mapping[str, Any] | None
    weight: float
    pools: tuple[str, ...]
    number: int = 0


@dataclass(frozen=True)
class TemplateSettings:
    """A checked template recipe."""

    pools: Mapping[str, Weighted]
    templates: Sequence[Template]
    rows: int
    formats: Sequence[tuple[TemplateFormat, float]] = (("newline", 1.0),)
    system_prompt: str = ""
    kind: str = "template"

    def combinations(self, template: Template) -> int:
        """Return how many different draws the template allows."""
        return prod(len(self.pools[name].values) for name in template.pools)


class _Draw:
    """One weighted choice, prepared for many draws."""

    def __init__(self, weights: Sequence[float]):
        self.cumulative = list(accumulate(weights))

    def index(self, random_source: random.Random) -> int:
        at = bisect(self.cumulative, random_source.random() * self.cumulative[-1])
        return min(at, len(self.cumulative) - 1)


def generate(
    settings: TemplateSettings, seed: int, name: str = "template", stands_already: Known = lambda _: False
) -> Iterator[Row]:
    """Yield exactly settings.rows rows, all different, and none that `stands_already` in the dataset.

    FAILED_PRECONDITION before the first row when pools and templates cannot give so many, and at the point where they
    are used up when different draws read the same.
    """
    _check_space(settings, name)
    return _rows(settings, seed, name, stands_already)


def _check_space(settings: TemplateSettings, name: str) -> None:
    possible = sum(settings.combinations(template) for template in settings.templates)
    if possible < settings.rows:
        raise _too_small(settings, name, possible)


def _too_small(settings: TemplateSettings, name: str, possible: int, standing: int = 0) -> LoralineError:
    given: Counter[int] = Counter()
    for template in settings.templates:
        given[template.number] += settings.combinations(template)
    each = "; ".join(f"templates[{number}] gives {count}" for number, count in list(given.items())[:10])
    elsewhere = f", and {standing} that other sources of the dataset have already" if standing else ""
    return failed_precondition(
        "TEMPLATE_SPACE_TOO_SMALL",
        f"{name}: {settings.rows} different rows are wanted, and pools and templates give {possible} ({each})"
        f"{elsewhere}. "
        "Add values to the pools, add templates, or ask for fewer rows.",
        wanted=str(settings.rows),
        possible=str(possible),
        source=name,
    )


def _rows(settings: TemplateSettings, seed: int, name: str, stands_already: Known) -> Iterator[Row]:
    random_source = random.Random(f"template:{seed}")  # noqa: S311 - reproducible draws, no secrets
    formats = _format_sequence(settings, random_source)
    drawer = _Drawer(settings, random_source, stands_already)
    for number, row_format in enumerate(formats, start=1):
        drawn = drawer.next_row(row_format)
        if drawn is None:
            raise _too_small(settings, name, number - 1, drawer.standing)
        index, messages = drawn
        rule = f"templates[{settings.templates[index].number}]"
        yield Row(messages, settings.kind, rule, f"{name}:{number}", row_format)


def _format_sequence(settings: TemplateSettings, random_source: random.Random) -> list[TemplateFormat]:
    """Return the format of every row: exactly the stated shares, rounded, in random order."""
    total = sum(weight for _, weight in settings.formats)
    exact = [settings.rows * weight / total for _, weight in settings.formats]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: settings.rows - sum(counts)]:
        counts[i] += 1
    sequence: list[TemplateFormat]
    sequence = [name for (name, _), count in zip(settings.formats, counts, strict=True) for _ in range(count)]
    random_source.shuffle(sequence)
    return sequence


class _Drawer:
    """Draws rows that were not drawn before."""

    def __init__(self, settings: TemplateSettings, random_source: random.Random, stands_already: Known):
        self._settings, self._stands_already = settings, stands_already
        self.standing = 0
        """Rows drawn that other sources have already."""
        self._random = random_source
        self._templates = _Draw([template.weight for template in settings.templates])
        self._spaces = _Draw([settings.combinations(template) for template in settings.templates])
        self._pools = {name: _Draw(pool.weights) for name, pool in settings.pools.items()}
        self._seen = DigestSet()
        self._rest: Iterator[tuple[int, dict[str, str]]] | None = None

    def next_row(self, row_format: TemplateFormat) -> tuple[int, list[dict[str, str]]] | None:
        """Return the template's index and the messages of a new row, or None when there is none left.

        Weighted draws find one while the space is wide. When they keep repeating themselves the draw goes on evenly
        over the whole space, and when that fails too the space is nearly used up and small enough to walk through.
        """
        if self._rest is None:
            for attempt in range(WEIGHTED_TRIES + UNIFORM_TRIES):
                index, values = self._draw(weighted=attempt < WEIGHTED_TRIES)
                messages = self._new(index, values, row_format)
                if messages is not None:
                    return index, messages
            self._rest = self._everything()
        for index, values in self._rest:
            messages = self._new(index, values, row_format)
            if messages is not None:
                return index, messages
        return None

    def _draw(self, *, weighted: bool) -> tuple[int, dict[str, str]]:
        index = (self._templates if weighted else self._spaces).index(self._random)
        values: dict[str, str] = {}
        for name in self._settings.templates[index].pools:
            pool = self._settings.pools[name].values
            at = self._pools[name].index(self._random) if weighted else self._random.randrange(len(pool))
            values[name] = pool[at]
        return index, values

    def _everything(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, template in enumerate(self._settings.templates):
            for values in product(*(self._settings.pools[name].values for name in template.pools)):
                yield index, dict(zip(template.pools, values, strict=True))

    def _new(self, index: int, values: dict[str, str], row_format: TemplateFormat) -> list[dict[str, str]] | None:
        template = self._settings.templates[index]
        prompt = fill(template.prompt, values)
        # Two rows are different when prompt and values are; the same draw in the other format is no new row.
        drawn = ({"role": name, "content": value} for name, value in values.items())
        key = row_digest([{"role": str(template.number), "content": prompt}, *drawn])
        if key in self._seen:
            return None
        response = self._response(template, values, row_format)
        messages = conversation(prompt, response, self._settings.system_prompt)
        written = row_digest(messages)
        if written in self._seen:
            return None
        self._seen.add(key)
        self._seen.add(written)
        if self._stands_already(messages):
            self.standing += 1
            return None
        return messages

    def _response(self, template: Template, values: Mapping[str, str], row_format: TemplateFormat) -> str:
        if row_format == "json":
            return json.dumps(fill(template.response_json, values), ensure_ascii=False)
        wordings = template.responses
        return fill(wordings[0] if len(wordings) == 1 else self._random.choice(wordings), values)
