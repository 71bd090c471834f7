"""Ends a vLLM process whose owner is gone.

vLLM's engine core is a process of its own. When the server is killed with SIGKILL nobody tells it, and it would keep
its memory, on a GPU all of it, for ever. vLLM calls :func:`enable` (a `vllm.general_plugins` entry point) in each of
its processes; in the children of a Loraline server it waits for the parent's end in a thread.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

OWNER_VARIABLE = "LORALINE_ENGINE_OWNER_PID"
"""Process id of the server; set by it before the engine starts, inherited by the engine's processes."""
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL: enough for the engine core to stop its workers."""


def claim() -> None:
    """Name this process as the owner of the engines that it will start."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())


def enable() -> bool:
    """Watch the parent when this is an engine process of a Loraline server; return whether it is watched."""
    owner, parent = os.environ.get(OWNER_VARIABLE, ""), multiprocessing.parent_process()
    if not owner or owner == str(os.getpid()) or parent is None:
        return False
    threading.Thread(target=_follow, args=(parent.join,), name="loraline-watch", daemon=True).start()
    return True


def _follow(wait_for_parent: Callable[[], None]) -> None:
    wait_for_parent()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
