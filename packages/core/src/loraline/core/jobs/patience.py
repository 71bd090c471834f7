"""Writes that wait for a database out of reach, because hours of work may hang on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from loraline.core.errors import LoralineError

_T = TypeVar("_T")


def patiently(write: Callable[[], _T], seconds: float = 300.0) -> _T:
    """Call a function again while it raises UNAVAILABLE, for at most so many seconds."""
    give_up, pause = time.monotonic() + seconds, 0.2
    while True:
        try:
            return write()
        except LoralineError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() + pause > give_up:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 5.0)
