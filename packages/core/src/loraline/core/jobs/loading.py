"""The time in which a job's process has nothing to save: a wish to stop ends it at once, and not when it next looks.

Importing torch or vLLM takes from seconds to minutes, in which no code of the job can ask whether it shall stop.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType

EXIT_WHILE_LOADING = 76


class StopSignal:
    """What SIGTERM does in a job's process: it ends it while it loads, and is remembered otherwise."""

    def __init__(self) -> None:
        self.terminated = threading.Event()
        """Set once the process was asked to stop."""
        self.loading = threading.Event()
        """Set while there is nothing to save; the runner then writes how the job ended."""

    def handler(self) -> Callable[[int, FrameType | None], None]:
        """Return the signal's handler. Python calls it in the main thread, between two steps of the interpreter."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.terminated.set()
            if self.loading.is_set():
                os.write(sys.stderr.fileno(), b"Asked to stop while loading; nothing had to be saved.\n")
                os._exit(EXIT_WHILE_LOADING)

        return stop
