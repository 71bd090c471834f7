"""The data card: data_card.json for programs, README.md for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraline.datagen.publish.spool import RowStatistics
from loraline.datagen.quality.findings import Finding

CARD_VERSION = 1


@dataclass
class DataCard:
    """Everything the card tells. Nothing here depends on when or where the dataset was made."""

    name: str
    train_rows: int
    validation_rows: int
    statistics: RowStatistics
    outcomes: Mapping[str, int]
    settings: Mapping[str, Any]
    inputs: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    sources: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the content of data_card.json."""
        statistics = self.statistics
        return {
            "version": CARD_VERSION,
            "name": self.name,
            "rows": {"train": self.train_rows, "validation": self.validation_rows, "answers": statistics.answers},
            "rows_by_outcome": dict(sorted(self.outcomes.items())),
            "rows_by_kind": _ranked(statistics.by_kind),
            "rows_by_rule": _ranked(statistics.by_rule),
            "rows_by_format": _ranked(statistics.by_format),
            "rows_by_source": _ranked(statistics.by_source),
            "characters": {
                "prompt": statistics.prompt_characters.summary(),
                "answer": statistics.answer_characters.summary(),
            },
            "sources": [dict(source) for source in self.sources],
            "findings": [finding.to_json() for finding in self.findings],
            "settings": dict(self.settings),
            "inputs": list(self.inputs),
        }

    def write(self, folder: Path) -> None:
        """Write both files."""
        card = self.to_json()
        text = json.dumps(card, ensure_ascii=False, indent=2)
        (folder / "data_card.json").write_text(text + "\n", encoding="utf-8", newline="\n")
        (folder / "README.md").write_text(_readme(card), encoding="utf-8", newline="\n")


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _readme(card: Mapping[str, Any]) -> str:
    rows = card["rows"]
    lines = [
        f"# Dataset {card['name']}",
        "",
        f"{rows['train']} rows for training and {rows['validation']} for validation, with {rows['answers']} answers "
        "in all. One JSON object a line: `messages` (role and content), and for people `kind`, the `rule` that decided "
        "it, the `source` it came from and the `format` of the answer.",
        "",
    ]
    for title, key in (
        ("What the rows are", "rows_by_kind"), ("Which rule decided", "rows_by_rule"),
        ("How answers are written", "rows_by_format"), ("Where they come from", "rows_by_source"),
        ("What became of the records", "rows_by_outcome"),
    ):  # fmt: skip
        lines += _table(title, card[key])
    lines += _lengths(card["characters"])
    lines += _sources(card["sources"])
    lines += _findings(card["findings"])
    settings = json.dumps(card["settings"], ensure_ascii=False, indent=2)
    lines += ["## Settings", "", "```json", settings, "```", ""]
    if card["inputs"]:
        lines += ["## Made from", "", *(f"- {text}" for text in card["inputs"]), ""]
    return "\n".join(lines)


def _table(title: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    rows = [f"| {_cell(name)} | {count} |" for name, count in counts.items()]
    return [f"## {title}", "", "| | rows |", "| --- | ---: |", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _lengths(characters: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [f"| {name} | {' | '.join(str(value) for value in figures.values())} |"
             for name, figures in characters.items() if figures]  # fmt: skip
    if not lines:
        return []
    head = ["## Lengths in characters", "", "| | min | median | mean | 95 % below | max |"]
    return [*head, "| --- | ---: | ---: | ---: | ---: | ---: |", *lines, ""]


def _sources(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for source in sources:
        for key, title in (("bad_records", "Records set aside"), ("ignored_files", "Files not converted")):
            if source.get(key):
                lines += [f"## {title} ({source['name']})", "", *(f"- {_cell(text)}" for text in source[key]), ""]
    return lines


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    if not findings:
        return []
    lines = [f"- **{f['code']}** ({f['severity']}): {f['message']} {f['why']} {f['remedy']}" for f in findings]
    return ["## Findings", "", *lines, ""]
