"""The threads of a merge: some compute and write blocks, others wait for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch

_DEPTH = 4
"""Blocks that may wait for each thread: enough that none stands idle, few enough for memory to stay flat."""
_DISK_THREADS = 2
"""One may wait for a whole shard while the other starts the next one's way to the disk."""
BYTES_PER_ELEMENT = 12
"""Memory of a thread for each element of a block: two 32-bit buffers and one of the written type."""


class Scratch:
    """One thread's buffers, used again for every block: fresh memory for each would cost more than the sums."""

    def __init__(self) -> None:
        self._wide = [torch.empty(0), torch.empty(0)]
        self._narrow = torch.empty(0, dtype=torch.uint8)

    def wide(self, number: int, shape: tuple[int, int]) -> torch.Tensor:
        """Return 32-bit buffer 0 or 1 in a shape; the next call with the number returns the same memory."""
        size = shape[0] * shape[1]
        if self._wide[number].numel() < size:
            self._wide[number] = torch.empty(size)
        return self._wide[number][:size].view(shape)

    def written(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the buffer that blocks are written from."""
        size = shape.numel() * dtype.itemsize
        if self._narrow.numel() < size:
            self._narrow = torch.empty(size, dtype=torch.uint8)
        return self._narrow[:size].view(dtype).view(shape)


class Crew:
    """Threads for blocks, each computing with one processor; sharing one block among them costs more than it gives.

    Use it as a context manager: leaving waits for all steps, and raises the first error unless one is on its way.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._local = threading.local()
        self._waiting: deque[Future[None]] = deque()
        self._disk_steps: list[Future[None]] = []

    def __enter__(self) -> Crew:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._blocks = ThreadPoolExecutor(self._threads, "merge-block", torch.set_num_threads, (1,))
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "merge-disk")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks.shutdown()
        self._disk.shutdown()
        torch.set_num_threads(self._before)
        if error is None:
            for step in (*self._waiting, *self._disk_steps):
                step.result()

    def block(self, work: Callable[[Scratch], None]) -> Future[None]:
        """Run `work` in some thread. Waits while many wait; raises what an earlier block raised."""
        while len(self._waiting) >= _DEPTH * self._threads:
            self._waiting.popleft().result()
        self._waiting.append(self._blocks.submit(self._run, work))
        return self._waiting[-1]

    def after(self, blocks: list[Future[None]], step: Callable[[], None], otherwise: Callable[[], None]) -> None:
        """Run `step`, which may wait for the disk, once all of `blocks` are done; `otherwise` if one failed."""

        def run() -> None:
            try:
                for block in blocks:
                    block.result()
            except BaseException:
                # A block that still runs would write into whatever file gets the descriptor's number next.
                wait(blocks)
                otherwise()
                raise
            step()

        self._disk_steps.append(self._disk.submit(run))

    def later(self, step: Callable[[], None]) -> None:
        """Run a step that may wait for the disk and whose failure does not matter; any thread may ask for it."""
        try:
            self._disk.submit(step)
        except RuntimeError:  # the crew is leaving
            return

    def _run(self, work: Callable[[Scratch], None]) -> None:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        work(self._local.scratch)
