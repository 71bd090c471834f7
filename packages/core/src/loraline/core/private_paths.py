"""Folders of the server that remote callers need not know: in what they are told, a name stands for each.

An error that was made deep inside a library names the file it stumbled over, such as one in the cache below the data
folder. The rest of the path is what helps; where the data folder lies is the operator's business.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from loraline.core.errors import LoralineError

_names: dict[str, str] = {}


def hide_folder(folder: Path, name: str) -> None:
    """Let `name` stand for this folder from now on, in everything that this process tells callers."""
    _names[str(folder)] = name


def without_private_paths(text: str) -> str:
    """Return the text with the name of each hidden folder in its place; the longest first, as one may hold another."""
    for folder in sorted(_names, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, _names[folder])
    return text


def told_to_callers(error: LoralineError) -> LoralineError:
    """Return the error as a caller shall see it."""
    clean = without_private_paths
    return replace(
        error,
        message=clean(error.message),
        fields={clean(path): clean(problem) for path, problem in error.fields.items()},
        metadata={name: clean(value) for name, value in error.metadata.items()},
    )


hide_folder(Path(sys.prefix), "$PYTHON")
