"""Running what strangers wrote, such as a chat template: bounded in time and memory, whatever it does."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_MOST_ANSWER = 64 * 1024 * 1024
_CHUNK = 1024 * 1024


class TooSlow(Exception):
    """The work did not end in time and was killed."""


class Failed(Exception):
    """The work raised an error, or its process died; the text says which."""


def contained(work: Callable[[], Any], *, seconds: float, memory: int) -> Any:
    """Do `work` in a forked copy of this process and return its result, which must be JSON.

    The copy may take `seconds`, and `memory` bytes more than this process has. A limit within the process would not
    do: a number that a template squares again and again is one call into C that no signal interrupts. Raises TooSlow or
    Failed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(work, writer, seconds, memory)
    os.close(writer)
    try:
        answer = _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # it has answered, or has to end now
        os.waitpid(child, 0)
    if answer is None:
        raise TooSlow
    try:
        found = json.loads(answer)
    except ValueError:
        raise Failed("its process died, most likely for want of memory") from None
    if "error" in found:
        raise Failed(found["error"])
    return found["result"]


def _child(work: Callable[[], Any], writer: int, seconds: float, memory: int) -> NoReturn:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the copy
        limit_memory(memory)
        _limit(resource.RLIMIT_CPU, int(seconds) + 2)  # should the parent die meanwhile
        try:
            answer = json.dumps({"result": work()})
        except BaseException as error:
            answer = json.dumps({"error": (str(error) or type(error).__name__)[:2000]})
        with os.fdopen(writer, "wb") as file:
            file.write(answer.encode())
    finally:
        os._exit(0)


def _read(reader: int, deadline: float) -> bytes | None:
    """Return everything that is written; None when the time is over before the end."""
    parts: list[bytes] = []
    size = 0
    while size <= _MOST_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        part = os.read(reader, _CHUNK)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    return b""


def limit_memory(extra: int) -> None:
    """Let this process grow by `extra` bytes at most."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        _limit(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + extra)


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
