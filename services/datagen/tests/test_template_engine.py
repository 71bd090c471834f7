"""Templates: reproducible, all different, in the stated formats, and honest about what they cannot give."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import LoralineError
from loraline.datagen.spec import template_of
from loraline.datagen.template.engine import generate
from loraline.datagen.template.places import fill, pools_in

NEWLINE, JSON = datagen_pb2.OUTPUT_FORMAT_NEWLINE, datagen_pb2.OUTPUT_FORMAT_JSON


def recipe(rows: int, sizes: tuple[int, int] = (20, 30)) -> datagen_pb2.TemplateRecipe:
    made = datagen_pb2.TemplateRecipe(rows=rows, system_prompt="Advise.")
    for name, size in zip(("mood", "hobby"), sizes, strict=True):
        made.pools[name].items.extend(datagen_pb2.PoolItem(text=f"{name} {n}") for n in range(size))
    made.templates.add(
        prompt="I am {mood} and like {hobby}.", response="Try {hobby}\nwhile {mood}.",
        response_json={"recommend": "{hobby}", "challenges": [{"title": "{mood}", "level": 3}]},
    )  # fmt: skip
    made.templates.add(prompt="{mood}?", response="Rest, {mood}.", response_json={"recommend": "{{rest}}"}, weight=0.5)
    return made


def lines(made: datagen_pb2.TemplateRecipe, seed: int) -> list[str]:
    return [row.to_line() for row in generate(template_of(made, "template"), seed)]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    assert lines(recipe(100), 1) == lines(recipe(100), 1)
    assert lines(recipe(100), 1) != lines(recipe(100), 2)


def test_rows_are_different_up_to_the_last_one_that_there_is() -> None:
    rows = lines(recipe(20 * 30 + 20), 3)
    assert len({json.dumps(json.loads(line)["messages"]) for line in rows}) == 620
    with pytest.raises(LoralineError) as caught:
        generate(template_of(recipe(621), "t"), 3)
    assert (caught.value.reason, caught.value.code.name) == ("TEMPLATE_SPACE_TOO_SMALL", "FAILED_PRECONDITION")
    assert caught.value.metadata == {"wanted": "621", "possible": "620", "source": "template"}


def test_draws_that_read_the_same_are_one_row() -> None:
    made = datagen_pb2.TemplateRecipe(rows=4)
    for name in "ab":
        made.pools[name].items.extend(datagen_pb2.PoolItem(text=text) for text in ("x", "xx"))
    made.templates.add(prompt="{a}{b}", response="ok")
    with pytest.raises(LoralineError) as caught:
        lines(made, 0)
    assert caught.value.metadata["possible"] == "3"
    made.rows = 3
    assert len(lines(made, 0)) == 3


def test_a_mix_has_the_stated_shares_and_every_row_tells_its_format() -> None:
    made = recipe(100)
    made.formats.add(format=NEWLINE, weight=1)
    made.formats.add(format=JSON, weight=3)
    rows = [json.loads(line) for line in lines(made, 5)]
    assert Counter(row["format"] for row in rows) == {"newline": 25, "json": 75}
    for row in rows:
        answer = row["messages"][-1]["content"]
        if row["format"] == "json":
            parsed = json.loads(answer)
            assert parsed["recommend"] == "{rest}" or parsed["challenges"][0]["level"] == 3
        else:
            assert "\n" in answer or answer.startswith("Rest")
    assert len({json.dumps(row["messages"][:2]) for row in rows}) == 100


def test_the_same_place_has_the_same_value_within_a_row() -> None:
    for row in generate(template_of(recipe(200), "t"), 9):
        prompt, answer = row.messages[1]["content"], row.messages[2]["content"]
        mood = prompt.removeprefix("I am ").split(" and ")[0].rstrip("?")
        assert f"{mood}." in answer


def test_weights_steer_the_draw() -> None:
    made = datagen_pb2.TemplateRecipe(rows=300)
    made.pools["who"].items.extend([datagen_pb2.PoolItem(text="often", weight=9), datagen_pb2.PoolItem(text="rare")])
    made.pools["n"].items.extend(datagen_pb2.PoolItem(text=str(n)) for n in range(2000))
    made.templates.add(prompt="{who} {n}", response="ok")
    drawn = Counter(row.messages[0]["content"].split()[0] for row in generate(template_of(made, "t"), 1))
    assert 240 < drawn["often"] < 295


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        (lambda r: r.templates.add(prompt="{nobody}", response="x"), "POOL_MISSING", "t.templates[2]"),
        (lambda r: r.templates.add(prompt="x"), "TEMPLATE_WITHOUT_RESPONSE", "t.templates[2].response"),
        (lambda r: r.templates.add(prompt=" ", response="x"), "TEMPLATE_EMPTY", "t.templates[2].prompt"),
        (
            lambda r: (r.templates.add(prompt="x", response="y"), r.formats.add(format=JSON, weight=1)),
            "TEMPLATE_WITHOUT_RESPONSE", "t.templates[2].response_json",
        ),
    ],
)  # fmt: skip
def test_wrong_templates_are_named(change, reason: str, field: str) -> None:  # type: ignore[no-untyped-def]
    made = recipe(5)
    change(made)
    with pytest.raises(LoralineError) as caught:
        template_of(made, "t")
    assert caught.value.reason == reason
    assert list(caught.value.fields) == [field]


def test_variations_are_drawn_evenly_and_make_no_second_answer_to_a_prompt() -> None:
    made = datagen_pb2.TemplateRecipe(rows=300, kind="feedback")
    made.pools["n"].items.extend(datagen_pb2.PoolItem(text=str(n)) for n in range(100))
    made.templates.add(prompt="Unused {n}", response="x", weight=0.0001)
    made.templates.add(
        prompt="Did {n}.", prompt_variations=["I did {n}!", "{n} is done.", "Did {n}."], response="Good: {n}.",
        response_variations=["{n}? Well done.", "On to {n} and one."],
    )  # fmt: skip
    rows = list(generate(template_of(made, "t"), 4))
    prompts = Counter(row.messages[0]["content"].replace("0", "") for row in rows)
    assert max(prompts.values()) <= 10
    assert {row.kind for row in rows} == {"feedback"}
    assert Counter(row.rule for row in rows)["templates[1]"] >= 295
    answers = Counter(row.messages[1]["content"].split()[0].rstrip("?:0123456789") for row in rows)
    assert all(70 <= answers[word] <= 130 for word in ("Good", "On", ""))
    assert len({row.messages[0]["content"] for row in rows}) == 300
    assert [row.to_line() for row in generate(template_of(made, "t"), 4)] == [row.to_line() for row in rows]
    made.rows = 401
    with pytest.raises(LoralineError) as caught:
        generate(template_of(made, "t"), 4)
    assert caught.value.metadata["possible"] == "400"
    assert "templates[1] gives 300" in caught.value.message
    made.templates.add(prompt="x", response="y", prompt_variations=["{nobody}"])
    with pytest.raises(LoralineError) as caught:
        template_of(made, "t")
    assert list(caught.value.fields) == ["t.templates[2]"]


def test_braces() -> None:
    assert pools_in('{a} {{b}} {"c": "{d}"}') == {"a", "d"}
    assert fill("{{{a}}} {{}}", {"a": "x"}) == "{x} {}"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**40), st.data())
def test_any_number_of_rows_that_exists_is_found(first: int, second: int, seed: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, first * second + first))
    made = lines(recipe(rows, (first, second)), seed)
    assert len(set(made)) == rows
