"""Loads the entries and finds the one that a reason or a message belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

import yaml

Language = Literal["en", "zh", "ko"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
STAGES = ("setup", "server", "artifacts", "jobs", "datagen", "trainer", "merger", "inference", "client")
"""Parts of the platform, in the order of the page; `setup` is the machine and its network."""


@dataclass(frozen=True)
class Text:
    """One entry in one language."""

    title: str
    what: str
    """What happened, and why it happens."""
    do: str
    """What to do, the likeliest cure first."""


@dataclass(frozen=True)
class Entry:
    """One known failure, or a few reasons that share a cure."""

    reasons: tuple[str, ...]
    stage: str
    patterns: tuple[re.Pattern[str], ...]
    """What real messages of this failure look like; empty for reasons that only the platform itself gives."""
    seeds: tuple[str, ...]
    """Systems that met the failure in the field."""
    texts: Mapping[Language, Text]

    @property
    def reason(self) -> str:
        """The entry's first reason: the one to report when a message matched."""
        return self.reasons[0]

    def text(self, language: Language = "en") -> Text:
        """Return the entry in a language."""
        return self.texts[language]


def anchor(reason: str) -> str:
    """Return the reason's anchor on the troubleshooting page, the same that error details link to."""
    return reason.lower().replace("_", "-")


@cache
def entries() -> tuple[Entry, ...]:
    """Return all entries, in the order of the page. ValueError names the entry that is not complete."""
    loaded: list[Entry] = []
    seen: dict[str, str] = {}
    folder = resources.files("loraline.core.diagnostics") / "entries"
    for stage in STAGES:
        rows = yaml.safe_load((folder / f"{stage}.yaml").read_text("utf-8"))
        for row in rows:
            entry = _entry(row, stage)
            for reason in entry.reasons:
                if reason in seen:
                    raise ValueError(f"{reason} is in {seen[reason]}.yaml and again in {stage}.yaml")
                seen[reason] = stage
            loaded.append(entry)
    return tuple(loaded)


def _entry(row: Mapping[str, Any], stage: str) -> Entry:
    reasons = tuple(row["reasons"])
    unknown = set(row) - {"reasons", "patterns", "seeds", *LANGUAGES}
    if unknown or not reasons:
        raise ValueError(f"{stage}.yaml: entry {reasons or row}: unknown keys {sorted(unknown)} or no reasons")
    texts: dict[Language, Text] = {}
    for language in LANGUAGES:
        try:
            texts[language] = Text(**{key: str(value).strip() for key, value in row[language].items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{stage}.yaml: {reasons[0]} has no complete text in {language}: {error}") from error
    patterns = tuple(re.compile(pattern, re.IGNORECASE) for pattern in row.get("patterns", ()))
    return Entry(reasons, stage, patterns, tuple(row.get("seeds", ())), texts)


@cache
def _by_reason() -> dict[str, Entry]:
    return {reason: entry for entry in entries() for reason in entry.reasons}


def find(reason: str) -> Entry | None:
    """Return the entry of a reason such as `QUOTA_EXHAUSTED`, or None."""
    return _by_reason().get(reason)


def explain(reason: str, language: Language = "en") -> str:
    """Return title, what happened and what to do as plain text; empty for a reason that has no entry."""
    entry = find(reason)
    if entry is None:
        return ""
    text = entry.text(language)
    return f"{text.title}\n{text.what}\n→ {text.do}"


def match(message: str) -> list[Entry]:
    """Return the entries whose patterns fit the message (an error, a log line, a traceback), best first.

    Of two entries that fit, the one whose pattern covers more of the message comes first: it says more about it.
    """
    found: list[tuple[int, int, Entry]] = []
    for position, entry in enumerate(entries()):
        hits = [hit for pattern in entry.patterns if (hit := pattern.search(message))]
        if hits:
            found.append((-max(hit.end() - hit.start() for hit in hits), position, entry))
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]
