"""The texts that the toy base learns from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from loraline.core.errors import invalid_argument

MAX_FILE_BYTES = 32 * 1024 * 1024
_TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".md", ".srt", ".tsv", ".txt", ".vtt", ".yaml", ".yml"}


def corpus_dialogues() -> list[tuple[str, str]]:
    """Return the shipped (question, answer) pairs, in a fixed order."""
    folder = resources.files("loraline.trainer.tiny") / "corpus"
    pairs: list[tuple[str, str]] = []
    for name in ("en.txt", "zh.txt"):
        for block in (folder / name).read_text(encoding="utf-8").strip().split("\n\n"):
            question, answer = block.strip().split("\n", 1)
            pairs.append((question.strip(), answer.strip()))
    return pairs


def folder_texts(folder: Path) -> Iterator[str]:
    """Yield the texts in the folder's files: the strings of JSON and CSV, the lines of anything else.

    Files that are no text by their name are left out. Raises INVALID_ARGUMENT (TEXT_NOT_UTF8, TEXT_TOO_LARGE).
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        if file.suffix.lower() not in _TEXT_SUFFIXES:
            continue
        name = file.relative_to(folder).as_posix()
        if file.stat().st_size > MAX_FILE_BYTES:
            message = f"{name} is larger than {MAX_FILE_BYTES} bytes, too much for a toy tokenizer. Leave it out."
            raise invalid_argument("TEXT_TOO_LARGE", message, tokenizer_texts=name)
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"{name} is not UTF-8 at byte {error.start}. Convert it first."
            raise invalid_argument("TEXT_NOT_UTF8", message, tokenizer_texts=name) from None
        yield from _texts_of(content, file.suffix.lower())


def _texts_of(content: str, suffix: str) -> Iterator[str]:
    try:
        if suffix == ".json":
            yield from _strings(json.loads(content))
            return
        if suffix == ".jsonl":
            for line in filter(None, map(str.strip, content.splitlines())):
                yield from _strings(json.loads(line))
            return
    except ValueError:
        pass  # Untidy files still hold the characters; the lines below give them.
    if suffix in {".csv", ".tsv"}:
        for row in csv.reader(io.StringIO(content), delimiter="\t" if suffix == ".tsv" else ","):
            yield from filter(None, map(str.strip, row))
        return
    yield from filter(None, map(str.strip, content.splitlines()))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
