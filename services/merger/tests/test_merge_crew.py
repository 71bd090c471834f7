"""Threads of a merge: a shard that fails is given up only when none of its blocks runs any more."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from loraline.merger.engines.crew import Crew


def test_a_failed_shard_is_closed_after_its_last_block() -> None:
    """A descriptor closed earlier goes to the next file that opens, and the late block writes into that one."""
    closed, go = threading.Event(), threading.Event()

    def fail(scratch: Any) -> None:
        raise ValueError("a block")

    def last(scratch: Any) -> None:
        go.wait(30)

    early = None
    with pytest.raises(ValueError, match="a block"), Crew(2) as crew:
        blocks = [crew.block(fail), crew.block(last)]
        crew.after(blocks, lambda: None, closed.set)
        early = closed.wait(0.5)
        go.set()
    assert early is False
    assert closed.is_set()
