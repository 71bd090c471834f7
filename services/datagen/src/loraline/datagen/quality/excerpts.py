"""The rows that findings name, read once more: where they came from and how they begin."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraline.datagen.quality.seen import FILES, messages_of

LONGEST_TEXT = 240


def read_excerpts(folder: Path, places: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return, by place (`train.jsonl:17`), the row's source, prompt and answer, each cut to 240 characters."""
    wanted: dict[str, set[int]] = {name: set() for name in FILES}
    for place in places:
        name, _, line = place.rpartition(":")
        wanted[name].add(int(line))
    found: dict[str, dict[str, str]] = {}
    for name, lines in wanted.items():
        if not lines:
            continue
        last = max(lines)
        with (folder / name).open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, start=1):
                if number in lines:
                    found[f"{name}:{number}"] = _excerpt(text)
                if number >= last:
                    break
    return found


def _excerpt(line: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return {"text": _cut(line)}
    messages = messages_of(row)
    if messages is None:
        return {"text": _cut(line)}
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    answer = next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), "")
    source = row.get("source")
    named = {"source": source} if isinstance(source, str) and source else {}
    return {**named, "prompt": _cut(prompt), "answer": _cut(answer)}


def _cut(text: str) -> str:
    # Half surrogates, which JSON can spell, cannot be written as UTF-8.
    whole = text.strip().encode("utf-8", "replace").decode("utf-8")
    return f"{whole[:LONGEST_TEXT]}…" if len(whole) > LONGEST_TEXT else whole
