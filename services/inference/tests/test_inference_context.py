"""Long conversations in a window: whole turns, the oldest left out first, and no more of them than must be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loraline.inference.sessions.context import Message, fit, room_for_prompt

pytestmark = pytest.mark.asyncio
LEAD: list[Message] = [{"role": "system", "content": "L" * 7}]
NEW: list[Message] = [{"role": "user", "content": "N" * 5}]
SIZES = [11, 3, 40, 2, 9, 1, 26, 8, 5]
TURNS: list[list[Message]] = [
    [
        {"role": "user", "content": chr(ord("a") + number) * size},
        {"role": "assistant", "content": chr(ord("A") + number) * (size // 2 + 1)},
    ]
    for number, size in enumerate(SIZES)
]


class Format:
    """Renders a message to its characters' ids and one that ends it; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def render(self, messages: Sequence[Message]) -> list[int]:
        self.asked += 1
        return [ord(letter) for message in messages for letter in (*message["content"], "\n")]

    async def without(self, count: int) -> list[int]:
        return await self.render([*LEAD, *(message for turn in TURNS[count:] for message in turn), *NEW])


@pytest.mark.parametrize("turns", range(len(TURNS) + 1))
async def test_as_many_of_the_newest_turns_as_fit_and_no_part_of_one(turns: int) -> None:
    plain, kept = Format(), TURNS[len(TURNS) - turns :]
    first = len(TURNS) - turns
    sizes = [len(await plain.without(count)) for count in range(first, len(TURNS) + 1)]
    assert sizes == sorted(sizes, reverse=True)
    for room in sorted({max(1, size + more) for size in sizes for more in (-1, 0, 1)} | {1, 10_000}):
        counted = Format()
        ids, left_out = await fit(counted.render, LEAD, kept, NEW, room)
        wanted = next((count for count, size in enumerate(sizes) if size <= room), turns)
        assert left_out == wanted, room
        assert ids == await plain.without(first + wanted)
        assert len(ids) <= room or wanted == turns  # lead and question stay, also where they alone are too long
        assert counted.asked <= 2 + turns.bit_length()  # rendering a long talk takes time


async def test_lead_and_question_that_are_too_long_alone_are_kept_whole() -> None:
    ids, left_out = await fit(Format().render, LEAD, TURNS, NEW, 3)
    assert ("".join(map(chr, ids)), left_out) == ("LLLLLLL\nNNNNN\n", len(TURNS))
    assert await fit(Format().render, LEAD, [], NEW, 3) == (ids, 0)


@pytest.mark.parametrize(
    ("limit", "max_tokens", "window", "room"),
    [
        (511, 100, 512, 412),
        (511, 400, 512, 256),  # an answer takes at most half from the talk
        (50, 100, 512, 50),
        (1, 1, 2, 1),
        (1, 1, 1, 1),
    ],
)
async def test_the_answer_keeps_its_room_up_to_half_the_window(
    limit: int, max_tokens: int, window: int, room: int
) -> None:
    assert room_for_prompt(limit, max_tokens, window) == room
