"""What an engine process said before it failed, at its start or in mid-run.

vLLM's engine core is a process of its own: when it cannot start, the server learns only that it could not ("See root
cause above"), and when it dies later, only that it is gone. vLLM calls :func:`enable` (a `vllm.general_plugins` entry
point) in each of its processes; there errors that it logs are also written to a file that the server names.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

VARIABLE = "LORALINE_ENGINE_LAST_WORDS"
"""File to write to; set by the server before the engine starts, inherited by the engine's processes."""
_PREFIX = "loraline-engine-"
"""Of its name; the server's process id and some letters follow."""
_MOST_CHARACTERS = 4000
_MOST_BYTES = 1024 * 1024
"""Size at which the file begins anew: an engine may live for months and log an error for each request it refuses."""
_BURST_SECONDS = 30.0
"""What a dying engine's processes say, they say within so long of the last word, and that is read soon after."""
_DUMP = "Dumping "
"""How vLLM begins what it logs of its settings and its batch before the cause: thousands of characters, no cause."""


class _Words(logging.Handler):
    def __init__(self, path: str):
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception_only(record.exc_info[1])).strip() or text
        elif text.startswith(_DUMP):
            return
        try:
            path = Path(self._path)
            full = path.stat().st_size > _MOST_BYTES
            with path.open("w" if full else "a", encoding="utf-8") as file:
                file.write(json.dumps([record.created, text[:_MOST_CHARACTERS]]) + "\n")
        except OSError:
            pass  # words are lost, not the engine


def enable() -> bool:
    """Keep this process's errors where it is an engine process of a server that asked for them."""
    path = os.environ.get(VARIABLE, "")
    if not path or multiprocessing.parent_process() is None:
        return False
    logger = logging.getLogger("vllm")
    if not any(isinstance(handler, _Words) for handler in logger.handlers):
        logger.addHandler(_Words(path))
    return True


def listen() -> None:
    """Name an empty file to the engine that is about to start; `forget` removes it."""
    forget()
    _forget_the_dead()
    handle, path = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", suffix=".txt")
    os.close(handle)
    os.environ[VARIABLE] = path


def _forget_the_dead() -> None:
    """Remove the files of servers that were killed, and could not; what cannot be removed stays."""
    for file in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*.txt"):
        owner = file.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and _is_gone(int(owner)):
            with suppress(OSError):  # another user's: an engine must start beside it
                file.unlink(missing_ok=True)


def _is_gone(process_id: int) -> bool:
    """Tell whether no other process has the id. Our own is of a server before us, as in a container started again."""
    if process_id == os.getpid():
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # another user's, or no process id at all
    return False


def said(*, at_the_end: bool = False) -> str:
    """Return what the engine's processes said, the cause first; empty for nothing.

    `at_the_end`: only the last burst of words, of just now: the engine ran before and may have refused this or that.
    """
    try:
        lines = Path(os.environ[VARIABLE]).read_text(encoding="utf-8", errors="replace").splitlines()
    except (KeyError, OSError):
        return ""
    words = [read for line in lines if (read := _read(line)) is not None]
    newest = max((at for at, _ in words), default=0.0)
    since = max(newest, time.time() - _BURST_SECONDS) - _BURST_SECONDS if at_the_end else 0.0
    return "\n".join(text for at, text in words if at >= since)[:_MOST_CHARACTERS].strip()


def _read(line: str) -> tuple[float, str] | None:
    try:
        at, text = json.loads(line)
        return float(at), str(text)
    except (ValueError, TypeError):  # a process that was killed while it wrote
        return None


def forget() -> None:
    """Remove the file of an engine that is gone."""
    path = os.environ.pop(VARIABLE, "")
    if path:
        Path(path).unlink(missing_ok=True)
