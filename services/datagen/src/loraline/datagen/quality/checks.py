"""The checks of a dataset's files, in one pass over each."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraline.datagen.quality.findings import ROWS_SHOWN, Finding, gravest_first
from loraline.datagen.rows import prompt_digest, row_digest

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
ADVISED_ROWS = 500
FIXED_SHARE = 0.5
REPEATED_SYSTEM_SHARE = 0.9
SHARES_NEED_ROWS = 20
ROLES = frozenset({"system", "user", "assistant"})


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each row with its line number; a line that is no JSON comes as None."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def messages_of(row: Any) -> list[Mapping[str, Any]] | None:
    """Return the row's messages, or None when it has none that can be read."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        return None
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return None
        if not isinstance(message.get("content"), str):
            return None
    return messages


class DatasetCheck:
    """Collects what is wrong while the rows go by; memory grows with 32 bytes or so a row, not with their texts."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self._found: defaultdict[str, list[str]] = defaultdict(list)
        self._count: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._train_prompts: set[bytes] = set()
        self._systems: Counter[str] = Counter()
        self._first_lines: Counter[str] = Counter()
        self._formats: Counter[str] = Counter()

    def add_file(self, folder: Path, name: str) -> None:
        """Check one file; train.jsonl must come before validation.jsonl."""
        for number, row in read_rows(folder / name):
            self.add(name, number, row)

    def add(self, name: str, number: int, row: Any) -> None:
        """Check one row."""
        place = f"{name}:{number}"
        self.rows[name] += 1
        messages = messages_of(row)
        if messages is None:
            self._report("ROW_INVALID", place)
            return
        if not any(message["role"] == "assistant" for message in messages):
            self._report("ROW_WITHOUT_ASSISTANT", place)
        if not all(message["content"].strip() for message in messages):
            self._report("EMPTY_CONTENT", place)
        elif any(m["content"] != m["content"].strip() for m in messages if m["role"] != "system"):
            self._report("UNTRIMMED_CONTENT", place)
        digest = row_digest(messages)
        if digest in self._seen:
            self._report("EXACT_DUPLICATES", place)
        self._seen.add(digest)
        prompt = prompt_digest(messages)
        if name == TRAIN:
            self._train_prompts.add(prompt)
        elif prompt in self._train_prompts:
            self._report("LEAKAGE", place)
        self._count_shares(row, messages)

    def _count_shares(self, row: Mapping[str, Any], messages: list[Mapping[str, Any]]) -> None:
        if messages[0]["role"] == "system":
            self._systems[messages[0]["content"]] += 1
        asked = next((m["content"] for m in messages if m["role"] == "user"), "")
        first, _, rest = asked.partition("\n")
        if rest or len(first) <= 200:
            self._first_lines[first] += 1
        answer = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")
        text = answer.strip()
        self._formats["json" if text.startswith("{") and text.endswith("}") else "text"] += 1

    def _report(self, code: str, place: str) -> None:
        self._count[code] += 1
        if len(self._found[code]) < ROWS_SHOWN:
            self._found[code].append(place)

    def findings(self) -> list[Finding]:
        """Return everything found, gravest first."""
        total = self.rows.total()
        found = [
            Finding(code, f"{_rows(self._count[code])} of {total}: {_MESSAGES[code]}", self._count[code], places)
            for code, places in self._found.items()
        ]
        if not self.rows[TRAIN]:
            found.append(Finding("EMPTY_DATASET", f"{TRAIN} has no rows."))
        elif total < ADVISED_ROWS:
            found.append(Finding("FEW_ROWS", f"The dataset has {_rows(total)}; {ADVISED_ROWS} are advised.", total))
        if self.rows[TRAIN] and not self.rows[VALIDATION]:
            found.append(Finding("NO_VALIDATION_ROWS", "The dataset has no validation rows."))
        found.extend(self._shares(total))
        return gravest_first(found)

    def _shares(self, total: int) -> Iterator[Finding]:
        if total < SHARES_NEED_ROWS:
            return
        if self._first_lines:
            line, count = self._first_lines.most_common(1)[0]
            if count / total >= FIXED_SHARE:
                told = f"{_rows(count)} of {total} ask with the same first line: {line[:80]!r}."
                yield Finding("FIXED_INSTRUCTION", told, count)
        if self._systems:
            _, count = self._systems.most_common(1)[0]
            if count / total >= REPEATED_SYSTEM_SHARE:
                told = f"{_rows(count)} of {total} carry the same system prompt."
                yield Finding("REPEATED_SYSTEM_PROMPT", told, count)
        if len(self._formats) > 1:
            told = ", ".join(f"{count} {name}" for name, count in sorted(self._formats.items()))
            fewer = min(self._formats.values())
            yield Finding("MIXED_FORMATS", f"Answers come in more than one format: {told}.", fewer)


_MESSAGES = {
    "ROW_INVALID": "not a list of messages with role and text.",
    "ROW_WITHOUT_ASSISTANT": "without an assistant turn.",
    "EMPTY_CONTENT": "with an empty turn.",
    "UNTRIMMED_CONTENT": "with white space at the ends of a turn.",
    "EXACT_DUPLICATES": "exact duplicates of an earlier row.",
    "LEAKAGE": "validation rows whose prompt also stands in train.jsonl.",
}


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def check_folder(folder: Path) -> DatasetCheck:
    """Check a dataset's folder; a missing file counts as an empty one."""
    check = DatasetCheck()
    for name in (TRAIN, VALIDATION):
        if (folder / name).is_file():
            check.add_file(folder, name)
    return check
