"""A row of a dataset: what every source yields and every file holds."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
RowFormat = Literal["newline", "json", "text"]


@dataclass(slots=True)
class Row:
    """One training row.

    `kind` says what it is (`dialogue`, `settings_qa`, `background`, or the recipe that made it), `rule` which rule
    decided that, `source` where it came from (`file.csv:17`), `format` how the answer is written: one JSON object
    (`json`), lines that a template wrote (`newline`), or free text (`text`). `repaired` rows come from a model's JSON
    that had to be mended; only they say so.
    """

    messages: list[dict[str, str]]
    kind: str
    rule: str
    source: str
    format: RowFormat = "text"
    repaired: bool = False

    def to_line(self) -> str:
        """Return the row as one line of JSON, without the line end."""
        row: dict[str, Any] = {
            "messages": self.messages,
            "kind": self.kind,
            "rule": self.rule,
            "source": self.source,
            "format": self.format,
        }
        if self.repaired:
            row["repaired"] = True
        return json.dumps(row, ensure_ascii=False)


def conversation(prompt: str, response: str, system: str = "") -> list[dict[str, str]]:
    """Return the messages of one question and its answer."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def row_digest(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """Return 16 bytes that are equal exactly when the messages are."""
    canonical = json.dumps([[m.get("role"), m.get("content")] for m in messages], ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).digest()[:16]


def prompt_digest(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """Return 16 bytes for what is said before the first answer, system prompt aside.

    Width, case and white space do not count: "Hello!" and "hello！" are the same prompt, and a row with one must not
    validate a model that was trained on the other.
    """
    said: list[str] = []
    for message in messages:
        if message.get("role") == "assistant":
            break
        if message.get("role") != "system":
            said.append(str(message.get("content", "")))
    text = " ".join(unicodedata.normalize("NFKC", "\n".join(said)).casefold().split())
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
