"""Items of a streamed array: found whole, in order, and as soon as the text that ends them has come."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from loraline.inference.profiles.items import ItemScanner

ANSWERS: list[dict[str, Any]] = [
    {"boats": ["plain", "two words"]},
    {"boats": []},
    {"boats": [], "after": ["no"]},
    {"boats": ['say "ahoy"', "a \\ b", 'ends with a quote"', "\\", '\\"', '"']},
    {"boats": ["[", "]", "{", "}", ",", ":", '],"boats":["no"]', "}]}", '{"boats":["no"]}']},
    {"boats": ["tab\t", "line\n", "nul\x00", "바다", "🌊", "\u2028"]},
    {"boats": [1, -2.5e-3, True, False, None, 0]},
    {"boats": [[1, [2, [3]]], [], [[]], ["]", "["]]},
    {"boats": [{"name": "a", "boats": ["inner", "]"]}, {}, {"deep": {"boats": [1, 2]}}]},
    {"before": ["boats", "no"], "boats": ["yes"]},
    {"before": {"boats": ["no"]}, "boats": ["yes"]},
    {"before": [["boats", ["no"]]], "boats": ["yes"], "after": {"boats": ["no"]}},
    {"title": "boats", "other": ["no"], "boats": ["yes"]},
    {'bo"ats': ["no"], "bo\\ats": ["no"], "boats": ["yes"], "BOATS": ["no"]},
    {"boats": "no list", "list": ["no"]},
    {"boats": {"boats": ["no"]}},
    {"other": ["no"]},
    {},
]
WRITTEN = [
    *(json.dumps(answer) for answer in ANSWERS),
    *(json.dumps(answer, ensure_ascii=False, separators=(",", ":")) for answer in ANSWERS),
    *(json.dumps(answer, indent=2) for answer in ANSWERS),
    r'{"\u0062oats": ["\u005d", "\ud83c\udf0a", "\/"]}',
    ' \n{ "boats" : [ "a" , [ 1 , 2 ] ] , "after" : [ 3 ] } ',
]


def items_of(text: str) -> list[Any]:
    """Return what the answer's array holds, by the library's parser."""
    found = json.loads(text).get("boats")
    return found if isinstance(found, list) else []


@pytest.mark.parametrize("text", WRITTEN)
def test_every_cut_gives_the_same_items(text: str) -> None:
    expected = items_of(text)
    assert ItemScanner("boats").feed(text) == expected
    by_letter = ItemScanner("boats")
    assert [item for letter in text for item in by_letter.feed(letter)] == expected
    for cut in range(len(text) + 1):
        scanner = ItemScanner("boats")
        first = scanner.feed(text[:cut])
        assert first == expected[: len(first)], cut  # nothing that is not whole
        assert [*first, *scanner.feed(text[cut:])] == expected, cut


@pytest.mark.parametrize("text", ['{"a":["no"],"boats":["x, ]","y",[1,2],{"b":"}"},3],"z":[4]}'])
def test_an_item_is_there_with_the_letter_that_ends_it(text: str) -> None:
    ends, scanner = [], ItemScanner("boats")
    for position, letter in enumerate(text):
        ends += [(text[:position], item) for item in scanner.feed(letter)]
    assert [item for _, item in ends] == ["x, ]", "y", [1, 2], {"b": "}"}, 3]
    # The text before the comma or bracket ends with the item itself: it was not held back for another letter.
    assert all(before.endswith(json.dumps(item, separators=(",", ":"))) for before, item in ends)


def test_every_pair_of_cuts_of_the_hardest_answer() -> None:
    text = json.dumps({"a": {"boats": ["no"]}, "boats": ['"],', {"b": ["\\", "]"]}, [[]], "바"]}, ensure_ascii=True)
    expected = items_of(text)
    for first, second in itertools.combinations(range(len(text)), 2):
        scanner = ItemScanner("boats")
        parts = (text[:first], text[first:second], text[second:])
        assert [item for part in parts for item in scanner.feed(part)] == expected, (first, second)
