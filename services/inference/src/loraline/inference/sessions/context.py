"""What of a long conversation goes into the model's window: whole turns, the newest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from loraline.inference.sessions.record import Message

Render = Callable[[Sequence[Message]], Awaitable[list[int]]]
"""Messages to the ids that ask for the next answer."""


def room_for_prompt(limit: int, max_tokens: int, window: int) -> int:
    """Return the tokens that a conversation may take so that the answer has room: what was asked, at most half."""
    return max(1, min(limit, window - min(max_tokens, window // 2)))


async def fit(
    render: Render, lead: Sequence[Message], turns: Sequence[Sequence[Message]], new: Sequence[Message], room: int
) -> tuple[list[int], int]:
    """Return the prompt's ids with as many of the newest turns as `room` tokens hold, and how many were left out.

    The lead (the system prompt) and the new messages are always in, also when they alone take more than the room.
    """

    async def ids_without(count: int) -> list[int]:
        return await render([*lead, *(message for turn in turns[count:] for message in turn), *new])

    ids = await ids_without(0)
    if len(ids) <= room or not turns:
        return ids, 0
    few, many = 0, len(turns)  # leaving out `few` is too little; `many` is enough, or all there is
    shortest: list[int] | None = None
    while many - few > 1:
        middle = (few + many) // 2
        ids = await ids_without(middle)
        if len(ids) <= room:
            many, shortest = middle, ids
        else:
            few = middle
    return (shortest if shortest is not None else await ids_without(many)), many


def left_out_notice(session: str, left_out: int, turns: int, window: int) -> str:
    """Say that earlier turns were not seen by the model."""
    which = "the oldest turn" if left_out == 1 else f"the {left_out} oldest turns"
    return (
        f"Of {turns} earlier turns in {session}, {which} were left out: the context window of {window} tokens has no "
        "room for them. The session still keeps them; ResetSession begins anew."
    ).replace("the oldest turn were", "the oldest turn was")
