"""The salvage ladder under damage: 6,000 answers broken in one place, each judged by what still stands in it."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from loraline.datagen.llms.salvage import salvage

ANSWERS = 8000
KEYS = ("question", "parts")
WORDS = [
    "sea",
    "요청하신 [2개]",
    "```",
    "}",
    "{",
    '"',
    "\\",
    "\n",
    "[2]",
    "，",
    "<think>",
    "</think>",
    "{}",
    "é",
    "1.5",
    "'",
]
PROSE = [
    "",
    "Sure! ",
    "요청하신 [2개]:\n",
    "Here { you go:\n",
    '<think>{"question": 1}</think>',
    "{2개} ",
    "As asked (2): ",
]
FORMS = ("array", "wrapped", "fenced", "loose", "other")


def text_of(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(6)))


def item_of(draw: random.Random, number: int) -> dict[str, Any]:
    parts = [{"title": text_of(draw)} for _ in range(draw.randrange(3))]
    return {"question": f"{number} {text_of(draw)}", "parts": parts}


def answer_of(draw: random.Random, made: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """Return an answer that holds the items, and where each of them stands."""
    form = draw.choice(FORMS)
    opening, closing = {
        "array": ("[", "]"), "wrapped": ('{"items": [', "]}"), "fenced": ("```json\n[", "]\n```"), "loose": ("", ""),
        "other": ('{"rows": [', "]}"),
    }[form]  # fmt: skip
    text, spans = draw.choice(PROSE) + opening, []
    for number, item in enumerate(made):
        text += (draw.choice(["\n", "\n2. "]) if form == "loose" else ", ") if number else ""
        body = json.dumps(item, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        spans.append((len(text), len(text) + len(body)))
        text += body
    return text + closing + draw.choice(["", "\nDone."]), spans


def damage(draw: random.Random, text: str, first: int) -> tuple[str, int, int]:
    """Return the text broken in one place: where, and how many characters it lost there (all behind it for a cut)."""
    place = draw.randrange(first, len(text))
    kind = draw.choice(["cut", "delete", "insert", "replace", "none"])
    if kind == "cut":
        return text[:place], place, len(text)
    if kind == "delete":
        return text[:place] + text[place + 1 :], place, 1
    if kind == "insert":
        return text[:place] + draw.choice('"{}[],:\\x\n') + text[place:], place, -1
    if kind == "replace":
        return text[:place] + draw.choice('"{}[],:\\x\n') + text[place + 1 :], place, 0
    return text, len(text), 0


def substance(text: str) -> str:
    """Return letters and digits, escapes aside: what a repair must keep as it is."""
    return "".join(character for character in re.sub(r"\\(u[0-9a-fA-F]{4}|.)", "", text) if character.isalnum())


def judge(seed: int) -> tuple[int, int]:
    """Check one answer; return how many items stood whole in it, and how many were repaired."""
    draw = random.Random(seed)
    made = [item_of(draw, number) for number in range(draw.randrange(1, 6))]
    text, spans = answer_of(draw, made)
    broken, place, lost = damage(draw, text, spans[0][0])
    # A character put in just before an item does not touch it; one that goes missing at its first place does.
    whole = [
        item
        for item, (start, end) in zip(made, spans, strict=True)
        if end <= place or (lost != len(text) and (start > place or (lost < 0 and start == place)))
    ]
    found = salvage(broken, KEYS, cut=lost == len(text))
    exact = [item for number, item in enumerate(found.items) if number not in found.repaired]
    for item in whole:
        assert json.dumps(item) in {json.dumps(other) for other in exact}, (seed, broken, item)
    decoder = json.JSONDecoder()
    for item in exact:  # Every one stands in the text as it is.
        places = (at for at in range(len(broken)) if broken[at] == "{")
        assert item in made or any(_decodes(decoder, broken, at) == item for at in places), (seed, broken, item)
    for number in found.repaired:
        mended = found.items[number]
        assert mended.keys() >= set(KEYS), (seed, broken)
        assert substance(json.dumps(mended, ensure_ascii=False)) in substance(broken), (seed, broken, mended)
    return len(whole), len(found.repaired)


def _decodes(decoder: json.JSONDecoder, text: str, at: int) -> Any:
    try:
        return decoder.raw_decode(text, at)[0]
    except ValueError:
        return None


def test_every_whole_item_comes_out_byte_for_byte_and_none_is_invented() -> None:
    judged = [judge(seed) for seed in range(ANSWERS)]
    assert sum(whole for whole, _ in judged) > ANSWERS
    assert sum(mended for _, mended in judged) > 100


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"question": "a" "parts": []}', {"question": "a", "parts": []}),
        ("{'question': 'a', 'parts': []}", {"question": "a", "parts": []}),
        ('[{"question": "two\nlines", "parts": []}]', {"question": "two\nlines", "parts": []}),
        ('{"question": "a", "parts": [],}', {"question": "a", "parts": []}),
        ('{"question": "she said "no" twice", "parts": []}', {"question": 'she said "no" twice', "parts": []}),
    ],
)
def test_what_ends_but_does_not_decode_is_repaired_and_says_so(text: str, found: dict[str, Any]) -> None:
    got = salvage(text, KEYS)
    assert (got.items, got.rung, got.repaired) == ([found], "repaired", {0})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("I cannot help with that.", "no_json"),
        ('{"question": "half', "cut_off"),
        ('[{"question": "a", "parts": [{"title": "b"}, {"tit', "cut_off"),
        ('{"colour": "red"}', ""),
        ("[]", "no_item"),
        ("Use {curly} braces", "broken_json"),
    ],
)
def test_why_an_answer_holds_nothing(text: str, why: str) -> None:
    assert salvage(text, KEYS).why == why
    assert all("question" not in item for item in salvage(text, KEYS).items)


def test_hostile_text_is_given_up_in_bounded_time() -> None:
    assert salvage('{"question":' * 20_000, KEYS).items == []
    assert salvage("{" * 200_000, KEYS).items == []
