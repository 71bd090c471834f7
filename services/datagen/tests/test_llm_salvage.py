"""The salvage ladder: every complete item byte for byte, never an invented one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraline.datagen.llms.salvage import salvage

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['{"', "```", "}]", '\\"', "[2]"]
)
ITEM = st.fixed_dictionaries({"q": TEXT, "a": TEXT | st.lists(st.fixed_dictionaries({"t": TEXT}), max_size=2)})
PROSE = st.sampled_from(["", "Sure! ", "요청하신 [2개]:\n", "Here { you go:\n", '<think>{"q": 1}</think>', "{2개} "])


@pytest.mark.parametrize(
    ("text", "found", "rung"),
    [
        ('[{"a": 1}, {"a": 2}]', [1, 2], "whole"),
        ('{"items": [{"a": 1}]}', [1], "whole"),
        ('{"a": 1}', [1], "whole"),
        ('```json\n[{"a": 1}]\n```', [1], "fenced"),
        ('Here:\n```\n{"items": [{"a": 1}]}\n```\nand\n```json\n{"a": 2}\n```', [1, 2], "fenced"),
        ('<think>[{"a": 9}]</think>[{"a": 1}]', [1], "whole"),
        ('{"items": [{"a": 1}, {"a": 2}, {"a": "cu', [1, 2], "objects"),
        ('```json\n[{"a": 1}, {"a": {"b": {"c": 1}, "d', [1], "objects"),
        ('1. {"a": 1}\n2. {"a": 2}', [1, 2], "objects"),
        ('One {oops} then {"a": 1}', [1], "objects"),
        ("요청하신 [2개] 입니다", [], "none"),
        ("[1, 2, 3]", [], "none"),
        ("", [], "none"),
        ("<think>never ends {\"a\": 1}", [], "none"),
    ],
)  # fmt: skip
def test_the_ladder(text: str, found: list[int], rung: str) -> None:
    got = salvage(text)
    assert [item["a"] for item in got.items] == found
    assert got.rung == rung or (not found and got.rung == "whole")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ITEM, min_size=1, max_size=5), PROSE, st.sampled_from(["array", "wrapped", "fenced", "loose"]), st.data()
)
def test_whole_and_cut_answers(made: list[dict[str, Any]], prose: str, form: str, data: st.DataObject) -> None:
    parts = [json.dumps(item, ensure_ascii=False) for item in made]
    body = {
        "array": f"[{', '.join(parts)}]",
        "wrapped": f'{{"items": [{", ".join(parts)}]}}',
        "fenced": f"```json\n[{', '.join(parts)}]\n```",
        "loose": "\n".join(parts),
    }[form]
    text = prose + body
    complete = salvage(text).items
    # A fence inside an item's own text may hide the outer one; it must then still not invent anything.
    assert all(item in made for item in complete)
    if "```" not in "".join(parts):
        assert complete == made
    cut = data.draw(st.integers(len(prose), len(text)))
    kept = salvage(text[:cut]).items
    assert all(item in made for item in kept)
    if "```" not in "".join(parts) and form != "fenced":
        whole = [item for item, part in zip(made, parts, strict=True) if _ends(text, parts, part) <= cut]
        assert len(kept) >= len(whole) - _repeated(parts)


def _ends(text: str, parts: list[str], part: str) -> int:
    at = text.index(parts[0])
    for other in parts:
        at = text.index(other, at) + len(other)
        if other is part:
            return at
    raise AssertionError


def _repeated(parts: list[str]) -> int:
    return len(parts) - len(set(parts))
