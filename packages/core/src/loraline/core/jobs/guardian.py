"""Makes a job's process group end with the runner that started it, and with its leader.

Standard library only: the child calls this before it imports anything else.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.5


def guard_group(runner_pid: int) -> None:
    """Fork a tiny guardian into this process's group; on Linux ask the kernel for a death signal too.

    The guardian waits for the end of standard input, which comes when the runner is gone, however it went, and then
    kills the whole group: data loader workers and launchers as well. It also does so when this process ends. A thread
    could not: native code that keeps the interpreter's lock would stop it.
    """
    leader = os.getpid()
    if os.fork() == 0:
        _guard(leader)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != runner_pid:  # it went before the line above took effect
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _guard(leader: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while os.getppid() == leader:
            ready, _, _ = select.select([0], [], [], _LOOK_SECONDS)
            if ready and not os.read(0, 4096):
                break
    finally:
        os.killpg(os.getpgrp(), signal.SIGKILL)
