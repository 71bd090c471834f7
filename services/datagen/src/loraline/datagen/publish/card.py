"""The data card: data_card.json for programs, README.md for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraline.api.artifact.v1 import artifact_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.datagen.publish.spool import RowStatistics
from loraline.datagen.quality.findings import Finding

CARD_VERSION = 2
LONGEST_CELL = 300


@dataclass
class DataCard:
    """Everything the card tells; nothing here depends on when the dataset was made.

    `settings` are those of the request, `in_force` and each source's `in_force` are the same with every default.
    """

    name: str
    train_rows: int
    validation_rows: int
    statistics: RowStatistics
    outcomes: Mapping[str, int]
    settings: Mapping[str, Any]
    inputs: Sequence[artifact_pb2.ArtifactRef] = ()
    findings: Sequence[Finding] = ()
    sources: Sequence[Mapping[str, Any]] = field(default_factory=list)
    in_force: Mapping[str, Any] = field(default_factory=dict)

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
            "rejected_by_rule": rejected_by_rule(self.outcomes),
            "sources": [dict(source) for source in self.sources],
            "findings": [finding.to_json() for finding in self.findings],
            "in_force": dict(self.in_force),
            "settings": dict(self.settings),
            "inputs": [format_ref(ref) for ref in self.inputs],
            "lineage": [{"artifact": format_ref(ref), "digest": ref.digest} for ref in self.inputs],
            "made_by": {"loraline-datagen": version("loraline-datagen")},
        }

    def write(self, folder: Path) -> None:
        """Write both files."""
        card = self.to_json()
        text = json.dumps(card, ensure_ascii=False, indent=2)
        (folder / "data_card.json").write_text(text + "\n", encoding="utf-8", newline="\n")
        (folder / "README.md").write_text(_readme(card), encoding="utf-8", newline="\n")


def rejected_by_rule(outcomes: Mapping[str, int]) -> dict[str, int]:
    """Return how many rows each rule turned down, most first."""
    rules = [name for name in outcomes if name.startswith("rejected_")]
    return _ranked({name.removeprefix("rejected_"): outcomes[name] for name in rules})


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
        ("What became of the records", "rows_by_outcome"), ("Rows turned down, by rule", "rejected_by_rule"),
    ):  # fmt: skip
        lines += _table(title, card[key])
    lines += _lengths(card["characters"])
    lines += _sources(card["sources"])
    lines += _findings(card["findings"])
    lines += _in_force("Settings of the dataset", card["in_force"])
    settings = json.dumps(card["settings"], ensure_ascii=False, indent=2)
    lines += ["## The request", "", "```json", settings, "```", ""]
    if card["lineage"]:
        lines += ["## Made from", "", *(f"- {one['artifact']} ({one['digest']})" for one in card["lineage"]), ""]
    lines += [f"Made by loraline-datagen {card['made_by']['loraline-datagen']}.", ""]
    return "\n".join(lines)


def _in_force(title: str, settings: Mapping[str, Any]) -> list[str]:
    """Return a table of settings; long texts and schemas stand in data_card.json."""
    if not settings:
        return []
    rows = [f"| {_cell(name.replace('_', ' '))} | {_cell(_value(value))} |" for name, value in settings.items()]
    return [f"## {title}", "", "| | |", "| --- | --- |", *rows, ""]


def _value(value: Any) -> str:
    if value in ("", [], {}, None):
        return "none"
    if isinstance(value, str):
        return value if len(value) <= LONGEST_CELL else f"{value[:LONGEST_CELL]}…"
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    return _value(json.dumps(value, ensure_ascii=False))


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
        lines += _in_force(f"Source {source['name']} ({source['kind']})", source.get("in_force", {}))
        if source["kind"] == "llm":
            lines += _answered(source)
        for key, title in (("bad_records", "Records set aside"), ("ignored_files", "Files not converted")):
            if source.get(key):
                lines += [f"## {title} ({source['name']})", "", *(f"- {_cell(text)}" for text in source[key]), ""]
    return lines


def _answered(source: Mapping[str, Any]) -> list[str]:
    """Return which models answered, and what for."""
    models = ", ".join(f"{_cell(name)} ({count})" for name, count in source["models"].items()) or "none"
    told = {
        "answers by model": models, "items asked for": source["candidates"], "tokens in": source["prompt_tokens"],
        "tokens out": source["completion_tokens"], "cost in US dollars": source["cost_usd"],
        **{name.replace("_", " "): count for name, count in sorted(source["outcomes"].items())},
    }  # fmt: skip
    rows = [f"| {name} | {value} |" for name, value in told.items()]
    return [f"## Answers for {source['name']}", "", "| | |", "| --- | ---: |", *rows, ""]


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    if not findings:
        return []
    lines = [f"- **{f['code']}** ({f['severity']}): {f['message']} {f['why']} {f['remedy']}" for f in findings]
    return ["## Findings", "", *lines, ""]
