"""The server removes what dead writers left, and survives a store that fails."""

from __future__ import annotations

import asyncio
from typing import Any

from loraline.core.serving.housekeeping import SILENT_SECONDS, keep_house


class _Library:
    def __init__(self) -> None:
        self.asked: list[float] = []

    def collect_garbage(self, older_than_seconds: float) -> int:
        self.asked.append(older_than_seconds)
        if len(self.asked) == 1:
            raise OSError("the store is away")
        return 2


async def test_garbage_is_collected_again_after_a_failure() -> None:
    library: Any = _Library()
    task = asyncio.create_task(keep_house(library, interval_seconds=0.01))
    while len(library.asked) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    assert set(library.asked) == {SILENT_SECONDS}
