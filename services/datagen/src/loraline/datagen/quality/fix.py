"""The safe fixes: what can be mended without guessing. Every row keeps its other fields."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from loraline.datagen.quality.checks import TRAIN, VALIDATION, messages_of, read_rows
from loraline.datagen.rows import prompt_digest, row_digest


def fix_folder(source: Path, target: Path) -> Counter[str]:
    """Write the dataset with exact duplicates, empty turns' rows and leaking validation rows removed and ends trimmed.

    Returns how many rows each fix touched; empty when nothing had to be done. Rows that cannot be read stay as they
    are: the check reports them.
    """
    done: Counter[str] = Counter()
    seen: set[bytes] = set()
    train_prompts: set[bytes] = set()
    target.mkdir(parents=True)
    for name in (TRAIN, VALIDATION):
        if not (source / name).is_file():
            continue
        kept: list[str] = []
        for line, row in _lines(source / name):
            fixed = _fixed(row, name, seen, train_prompts, done)
            if fixed is not None:
                kept.append(line if fixed is row else json.dumps(fixed, ensure_ascii=False))
        if kept or name == TRAIN:
            (target / name).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8", newline="\n")
    for path in source.iterdir():
        if path.is_file() and path.name not in {TRAIN, VALIDATION, "manifest.json"}:
            shutil.copyfile(path, target / path.name)
    return done


def _lines(path: Path) -> list[tuple[str, Any]]:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    return [(line, row) for line, (_, row) in zip(lines, read_rows(path), strict=True)]


def _fixed(row: Any, name: str, seen: set[bytes], train_prompts: set[bytes], done: Counter[str]) -> Any:
    """Return the row, a trimmed copy of it, or None when it is left out."""
    messages = messages_of(row)
    if messages is None:
        return row
    trimmed = [{**m, "content": m["content"].strip()} if m["role"] != "system" else dict(m) for m in messages]
    if not all(message["content"].strip() for message in trimmed):
        done["EMPTY_CONTENT"] += 1
        return None
    digest = row_digest(trimmed)
    if digest in seen:
        done["EXACT_DUPLICATES"] += 1
        return None
    prompt = prompt_digest(trimmed)
    if name == VALIDATION and prompt in train_prompts:
        done["LEAKAGE"] += 1
        return None
    seen.add(digest)
    if name == TRAIN:
        train_prompts.add(prompt)
    if trimmed != [dict(message) for message in messages]:
        done["UNTRIMMED_CONTENT"] += 1
        return {**row, "messages": trimmed}
    return row
