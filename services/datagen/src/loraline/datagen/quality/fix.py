"""The safe fixes: what can be mended without guessing. Every row keeps its other fields."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraline.datagen.quality.digests import DigestGroups
from loraline.datagen.quality.report import REPORT_FILES
from loraline.datagen.quality.rules.answers import inside_fence
from loraline.datagen.quality.rules.damage import normalised
from loraline.datagen.quality.seen import FILES, TRAIN, LineIndex, messages_of, read_rows
from loraline.datagen.rows import prompt_digest, row_digest

Messages = list[dict[str, Any]]


def fix_folder(source: Path, target: Path, scratch: Path | None = None) -> Counter[str]:
    """Write the dataset with the safe fixes applied; return how many rows each fix touched, empty when none did.

    Text is normalised and trimmed and code fences around JSON are stripped; then rows with empty turns, exact
    duplicates of an earlier row, and validation rows whose prompt stands in train.jsonl are left out. Rows that
    cannot be read stay as they are: the check reports them. Both passes hold one row at a time.
    """
    done: Counter[str] = Counter()
    index = LineIndex()
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="fix-", dir=scratch) as own:
        left_out = _left_out(source, index, Path(own), done)
        for name in FILES:
            if (source / name).is_file():
                _write(source / name, target / name, index, left_out, done)
    for path in source.iterdir():
        if path.is_file() and path.name not in {*FILES, *REPORT_FILES, "manifest.json"}:
            shutil.copyfile(path, target / path.name)
    return done


def _left_out(source: Path, index: LineIndex, scratch: Path, done: Counter[str]) -> Any:
    """Return, for every line number of a LineIndex, whether its row is left out; one byte each."""
    rows, prompts = DigestGroups(scratch, "row"), DigestGroups(scratch, "prompt")
    empty: list[int] = []
    last = 0
    for number, messages in _readable(source, index):
        last = number
        mended, _ = mend(messages)
        if not all(message["content"].strip() for message in mended):
            empty.append(number)
            continue
        rows.add(row_digest(mended), number)
        prompts.add(prompt_digest(mended), number)
    left_out = np.zeros(last + 1, dtype=bool)
    left_out[empty] = True
    done["EMPTY_CONTENT"] += len(empty)
    for group in rows.groups():
        left_out[group[1:]] = True
        done["EXACT_DUPLICATES"] += len(group) - 1
    for group in prompts.groups():
        leaking = [int(row) for row in group if index.is_validation(int(row)) and not left_out[row]]
        if leaking and not index.is_validation(int(group[0])):
            left_out[leaking] = True
            done["LEAKAGE"] += len(leaking)
    for code in [code for code, count in done.items() if not count]:
        del done[code]
    return left_out


def _readable(source: Path, index: LineIndex) -> Iterator[tuple[int, Sequence[Mapping[str, Any]]]]:
    for name in FILES:
        if not (source / name).is_file():
            continue
        for line, row in read_rows(source / name):
            number = index.number(name, line)
            messages = messages_of(row)
            if messages is not None:
                yield number, messages


def _write(source: Path, target: Path, index: LineIndex, left_out: Any, done: Counter[str]) -> None:
    kept = 0
    with (
        source.open(encoding="utf-8", errors="replace", newline="\n") as lines,
        target.open("w", encoding="utf-8", newline="\n") as out,
    ):
        for line, text in enumerate(lines, start=1):
            number = index.number(source.name, line)
            if not text.strip() or (number < len(left_out) and left_out[number]):
                continue
            out.write(_fixed_line(text.rstrip("\n"), done) + "\n")
            kept += 1
    if not kept and source.name != TRAIN:
        target.unlink()


def _fixed_line(text: str, done: Counter[str]) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return text
    messages = messages_of(row)
    if messages is None:
        return text
    mended, codes = mend(messages)
    if not codes:
        return text
    done.update(codes)
    return json.dumps({**row, "messages": mended}, ensure_ascii=False)


def mend(messages: Sequence[Mapping[str, Any]]) -> tuple[Messages, list[str]]:
    """Return a row's messages normalised, without fences around JSON and trimmed, and the codes of what was done."""
    codes: dict[str, None] = {}
    mended: Messages = []
    for message in messages:
        text = normalised(message["content"])
        if text != message["content"]:
            codes["NOT_NORMALISED"] = None
        fenced = inside_fence(text.strip()) if message["role"] == "assistant" and "```" in text else None
        if fenced is not None:
            codes["FENCED_JSON"] = None
            text = fenced
        if message["role"] != "system" and text != text.strip():
            codes["UNTRIMMED_CONTENT"] = None
            text = text.strip()
        mended.append({**message, "content": text})
    return mended, list(codes)
