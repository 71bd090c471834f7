"""The report of a check: report.json for programs, report.html for people, which needs nothing from outside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from loraline.datagen.publish.spool import Lengths
from loraline.datagen.quality.checks import DatasetCheck
from loraline.datagen.quality.excerpts import read_excerpts
from loraline.datagen.quality.page import page
from loraline.datagen.quality.seen import TRAIN, VALIDATION

REPORT_VERSION = 2
REPORT_FILES = ("report.json", "report.html")
BARS = 24


def write_report(target: Path, dataset: str, rows: Path, check: DatasetCheck, passed: bool) -> None:
    """Write both files into `target`; `rows` is the folder of the dataset that was checked."""
    findings = [finding.to_json() for finding in check.findings]
    excerpts = read_excerpts(rows, [place for finding in findings for place in finding["rows"]])
    for finding in findings:
        finding["examples"] = [{"row": place, **excerpts.get(place, {})} for place in finding["rows"]]
    report = {
        "version": REPORT_VERSION,
        "dataset": dataset,
        "passed": passed,
        "rows": {"train": check.rows[TRAIN], "validation": check.rows[VALIDATION]},
        "findings": findings,
        "figures": _figures(check.figures()),
    }
    text = json.dumps(report, ensure_ascii=False, indent=2)
    (target / "report.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    (target / "report.html").write_text(page(report), encoding="utf-8", newline="\n")


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    lengths = {
        "prompt_characters": figures.pop("prompt_characters"),
        "answer_characters": figures.pop("answer_characters"),
    }
    if "tokens" in figures:
        lengths["row_tokens"] = Lengths(figures.pop("tokens"))
    told = {name: {**found.summary(), "histogram": histogram(found.counts)} for name, found in lengths.items()}
    return {**figures, "lengths": told}


def histogram(counts: Counter[int]) -> list[dict[str, int]]:
    """Return at most some 24 bars of equal, round width: `from` (inclusive), `to` (exclusive), `rows`.

    The last bar takes everything beyond the 99th percentile, so that one long row does not flatten the rest.
    """
    if not counts:
        return []
    usual = Lengths(counts).percentile(0.99)
    width = _round_width(max(1, usual // BARS + 1))
    bars: Counter[int] = Counter()
    last = usual // width
    for length, rows in counts.items():
        bars[min(length // width, last)] += rows
    longest = max(counts)
    return [
        {
            "from": at * width,
            "to": (at + 1) * width if at < last else max(longest + 1, (at + 1) * width),
            "rows": bars[at],
        }
        for at in range(min(bars), last + 1)
    ]


def _round_width(least: int) -> int:
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10
