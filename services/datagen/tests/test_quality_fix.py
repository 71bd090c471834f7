"""The fixes, the report, and the gate on publication."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loraline.datagen.publish.spool import Lengths
from loraline.datagen.quality.catalogue import CODES
from loraline.datagen.quality.fix import fix_folder
from loraline.datagen.quality.report import histogram, write_report
from loraline.datagen.quality.settings import CheckSettings

from .quality_data import check, found, persona, row

FENCED = '```json\n{"act": "sail"}\n```'
TRAIN = [
    row("Go.", FENCED, format="json", kind="commands", source="a.csv:2"),
    row("Who?", " It is me.\n"),
    row("Who?", "It is me."),
    row("Who?", "It is me."),
    row("Where?", "  "),
    row("Na\u200bme?", "cafe\u0301"),
    row("Line?", "one\r\ntwo"),
    "broken",
    row("Code?", "```python\nprint(1)\n```"),
]
VALIDATION = [row("who?", "Another."), row("New?", "Yes, new.")]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) if line != "broken" else line for line in path.read_text().splitlines()]


def test_safe_fixes_are_applied_and_counted_and_nothing_else_changes(tmp_path: Path) -> None:
    check(tmp_path / "d", TRAIN, VALIDATION)
    (tmp_path / "d" / "data_card.json").write_text("{}")
    (tmp_path / "d" / "report.html").write_text("old")
    done = fix_folder(tmp_path / "d", tmp_path / "fixed", tmp_path)
    assert dict(done) == {
        "FENCED_JSON": 1, "UNTRIMMED_CONTENT": 1, "EXACT_DUPLICATES": 2, "EMPTY_CONTENT": 1, "NOT_NORMALISED": 2,
        "LEAKAGE": 1,
    }  # fmt: skip
    fixed = lines(tmp_path / "fixed" / "train.jsonl")
    assert fixed[0] == {**TRAIN[0], "messages": row("Go.", '{"act": "sail"}')["messages"]}
    assert [made["messages"][-1]["content"] for made in fixed[1:4]] == ["It is me.", "caf\u00e9", "one\ntwo"]
    assert fixed[2]["messages"][0]["content"] == "Name?"
    assert fixed[4:] == TRAIN[7:]
    assert lines(tmp_path / "fixed" / "validation.jsonl") == VALIDATION[1:]
    assert sorted(path.name for path in (tmp_path / "fixed").iterdir()) == [
        "data_card.json", "train.jsonl", "validation.jsonl",
    ]  # fmt: skip
    assert not fix_folder(tmp_path / "fixed", tmp_path / "again", tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fixed" / name).read_bytes()


def test_what_fix_mends_is_what_the_catalogue_says(tmp_path: Path) -> None:
    before = found(check(tmp_path / "d", TRAIN, VALIDATION))
    fix_folder(tmp_path / "d", tmp_path / "fixed", tmp_path)
    after = found(check(tmp_path / "checked", lines(tmp_path / "fixed" / "train.jsonl"), VALIDATION[1:]))
    fixable = {code for code, meaning in CODES.items() if meaning.fixable}
    assert before.keys() & fixable == fixable
    assert not after.keys() & fixable


def test_the_persona_example_needs_no_fix(tmp_path: Path) -> None:
    check(tmp_path / "d", persona()[:396], persona()[396:])
    assert not fix_folder(tmp_path / "d", tmp_path / "fixed", tmp_path)
    assert (tmp_path / "fixed" / "train.jsonl").read_bytes() == (tmp_path / "d" / "train.jsonl").read_bytes()


class Page(HTMLParser):
    """Collects what a page would load, its text, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe", "object"}:
            self.loads.append(tag)
        self.loads += [name for name, _ in attrs if name in {"src", "href", "onclick", "onload"}]
        if tag not in {"meta", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [name for name, _ in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_escapes_everything_and_shows_the_rows(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> & <img src=x>"
    rows = [*persona()[:396], *TRAIN, row(nasty, nasty + " \ufffd", kind=nasty)]
    checked = check(tmp_path, rows, VALIDATION, CheckSettings(max_response_characters=150))
    write_report(tmp_path, "dataset/harbour:v3", tmp_path, checked, passed=False)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.loads == []
    assert page.open == []
    assert not re.search(r"https?:|url\(|@import", text)
    assert nasty in page.text
    assert "dataset/harbour:v3" in page.text
    assert "does not pass" in page.text
    for finding in checked.findings:
        assert finding.code in page.text
        assert finding.message in page.text
    assert "train.jsonl:397" in page.text
    assert "a.csv:2" in page.text
    for title in ("Prompts, in characters", "Languages of the answers", "Kinds of rows", "Rows that repeat others"):
        assert title in page.text
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["rows"] == {"train": 406, "validation": 2}
    assert report["figures"]["languages"]["zh"] > 150
    example = next(f for f in report["findings"] if f["code"] == "FENCED_JSON")["examples"][0]
    assert example == {"row": "train.jsonl:397", "source": "a.csv:2", "prompt": "Go.", "answer": FENCED}


@pytest.mark.parametrize("lengths", [[1], [0, 0, 1], list(range(1000)), [5] * 500 + [10_000], list(range(0, 9000, 7))])
def test_histograms_count_every_row_once(lengths: list[int]) -> None:
    counted = Lengths()
    for length in lengths:
        counted.add(length)
    bars = histogram(counted.counts)
    assert sum(bar["rows"] for bar in bars) == len(lengths)
    assert len(bars) <= 50
    assert bars[0]["from"] <= min(lengths)
    assert bars[-1]["to"] > max(lengths)
    assert all(left["to"] == right["from"] for left, right in pairwise(bars))
