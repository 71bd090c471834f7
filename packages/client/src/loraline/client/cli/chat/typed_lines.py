"""Lines as a person types them, with editing, history and completion, or as a pipe brings them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraline.client.cli.output import Output
from loraline.client.connection import data_dir
from loraline.client.errors import LoralineApiError

HISTORY_LINES = 2000
Choices = Callable[[], Sequence[str]]


def lines(output: Output, arguments: dict[str, Choices]) -> Iterator[str]:
    """Yield what is typed, or the lines of a pipe; ends at the end of input or at Ctrl-C on an empty prompt.

    `arguments` has for each command, such as `/model`, what gives the words that may follow it.
    """
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    readline = _readline()
    if readline is not None:
        _complete(readline, arguments)
    while True:
        try:
            line = input("you> ")
        except (EOFError, KeyboardInterrupt):
            output.say("")
            return
        if readline is not None:
            _remember(readline)
        yield line


def history_file() -> Path:
    """Return where typed lines are kept: in the data folder, for the owner alone."""
    return data_dir() / "chat_history"


def _readline() -> Any:
    """Return Python's readline, or None where it is missing; lines typed in earlier talks can be called up."""
    try:
        import readline
    except ImportError:
        return None
    with suppress(OSError):
        readline.read_history_file(history_file())
    return readline


def _remember(readline: Any) -> None:
    file = history_file()
    with suppress(OSError):  # a history that cannot be kept is no reason to stop talking
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        readline.set_history_length(HISTORY_LINES)
        readline.write_history_file(file)


def _complete(readline: Any, arguments: dict[str, Choices]) -> None:
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            found[:] = candidates(readline.get_line_buffer(), arguments)
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    # macOS brings libedit under readline's name.
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def candidates(line: str, arguments: dict[str, Choices]) -> list[str]:
    """Return what the last word of a line may become."""
    command, blank, word = line.partition(" ")
    if not command.startswith("/"):
        return []
    if not blank:
        return sorted(f"{name} " for name in arguments if name.startswith(command))
    choices = arguments.get(command)
    if choices is None or " " in word:
        return []
    try:
        return sorted(choice for choice in choices() if choice.startswith(word))
    except LoralineApiError:
        return []  # completing must never fail; asking will tell
