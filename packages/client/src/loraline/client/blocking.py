"""Blocking faces of async classes, without a second implementation.

A blocking class names the async methods it offers; the types of arguments and results carry over:

    class Jobs(Blocking[AsyncJobs]):
        get = blocking(AsyncJobs.get)              # coroutine -> plain return
        watch = blocking_stream(AsyncJobs.watch)   # async iterator -> plain iterator

All of them run on one event loop in a thread of its own, since gRPC's asyncio channels belong to one loop.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

SelfT = TypeVar("SelfT")
ReplyT = TypeVar("ReplyT")
P = ParamSpec("P")


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loraline-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, ReplyT]) -> ReplyT:
        """Run a coroutine and wait for it; Ctrl-C in the waiting thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the loop; calls after this hang no one: the loop refuses them."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Blocking(Generic[SelfT]):
    """An async object and the loop that it lives on."""

    def __init__(self, thread: LoopThread, target: SelfT):
        self._thread = thread
        self._target = target


def blocking(
    method: Callable[Concatenate[SelfT, P], Coroutine[Any, Any, ReplyT]],
) -> Callable[Concatenate[Any, P], ReplyT]:
    """Return the blocking form of a coroutine method."""

    @functools.wraps(method)
    def call(face: Blocking[SelfT], *args: P.args, **kwargs: P.kwargs) -> ReplyT:
        return face._thread.run(method(face._target, *args, **kwargs))

    return call


def blocking_stream(
    method: Callable[Concatenate[SelfT, P], AsyncIterator[ReplyT]],
) -> Callable[Concatenate[Any, P], Generator[ReplyT, None, None]]:
    """Return the blocking form of an async iterator; leaving the loop early ends the stream on the server too."""

    @functools.wraps(method)
    def iterate(face: Blocking[SelfT], *args: P.args, **kwargs: P.kwargs) -> Generator[ReplyT, None, None]:
        stream = method(face._target, *args, **kwargs)
        nothing = object()

        async def following() -> Any:
            return await anext(stream, nothing)

        async def end() -> None:
            await stream.aclose()  # type: ignore[attr-defined] - async generators all

        try:
            while (item := face._thread.run(following())) is not nothing:
                yield item
        finally:
            face._thread.run(end())

    return iterate
