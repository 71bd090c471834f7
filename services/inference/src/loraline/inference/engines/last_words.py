"""What an engine process said before it failed, at its start or in mid-run.

vLLM's engine core is a process of its own: when it cannot start, the server learns only that it could not ("See root
cause above"), and when it dies later, only that it is gone. vLLM calls :func:`enable` (a `vllm.general_plugins` entry
point) in each of its processes; there errors that it logs are also written to a file that the server names.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

VARIABLE = "LORALINE_ENGINE_LAST_WORDS"
"""File to write to; set by the server before the engine starts, inherited by the engine's processes."""
_MOST_CHARACTERS = 4000
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
            with Path(self._path).open("a", encoding="utf-8") as file:
                file.write(text[:_MOST_CHARACTERS] + "\n")
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
    handle, path = tempfile.mkstemp(prefix="loraline-engine-", suffix=".txt")
    os.close(handle)
    os.environ[VARIABLE] = path


def said() -> str:
    """Return what the engine's processes said, the cause first; empty for nothing."""
    try:
        return Path(os.environ[VARIABLE]).read_text(encoding="utf-8", errors="replace").strip()[:_MOST_CHARACTERS]
    except (KeyError, OSError):
        return ""


def forget() -> None:
    """Remove the file of an engine that is gone."""
    path = os.environ.pop(VARIABLE, "")
    if path:
        Path(path).unlink(missing_ok=True)
