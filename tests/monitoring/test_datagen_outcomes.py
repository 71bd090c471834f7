"""The outcomes of datagen's code, of the rejection rate's rule and of the metrics page are one list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import promql_parser as promql
import pytest
import yaml
from catalogue import LABELS

from loraline.datagen.llms.ledger import Outcome
from loraline.datagen.publish.outcomes import ACCEPTED, REFUSED, TOLD_BESIDES

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "services/datagen/src/loraline/datagen"
KNOWN = {ACCEPTED, *REFUSED, *TOLD_BESIDES}
OF_CALLS = {"answered", "budget", "candidates"}
"""Ends of a call that the intake counts as no row."""


def _counted(file: Path) -> Iterator[str]:
    """Yield the literal outcomes that a file counts or returns to be counted."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript):
            owner, key = node.target.value, node.target.slice
            if isinstance(owner, ast.Attribute) and owner.attr == "outcomes" and isinstance(key, ast.Constant):
                yield str(key.value)
        if isinstance(node, ast.FunctionDef) and node.name in ("_take_item", "_accept_new", "_problem"):
            for part in ast.walk(node):
                if isinstance(part, ast.Return) and isinstance(part.value, ast.Constant) and part.value.value:
                    yield str(part.value.value)


def test_every_outcome_that_the_code_counts_is_known() -> None:
    counted = {name for file in SOURCE.rglob("*.py") for name in _counted(file)}
    assert {"duplicate", "surplus", "mended", "no_prompt", "rejected_schema", "rejected_similar"} <= counted
    counted |= set(get_args(Outcome)) - OF_CALLS
    assert {name for name in counted if not name.startswith("rejected_")} == KNOWN


@pytest.mark.parametrize(("series", "left_out"), [("datagen:judged_rows:rate30m", 0), ("ratio", 1)])
def test_the_rate_sorts_the_outcomes_as_the_code_does(series: str, left_out: int) -> None:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules/recording.yml").read_text())["groups"]
    rules = {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}
    query = rules["datagen:rejected_rows:ratio_rate30m" if series == "ratio" else series]
    (found,) = re.findall(r'outcome!~"([^"]+)"', query)
    assert promql.parse(query) is not None
    besides = set(found.split("|"))
    assert besides == {*TOLD_BESIDES, *([ACCEPTED] if left_out else [])}


def test_the_metrics_page_names_every_outcome() -> None:
    for name in KNOWN:
        assert f"`{name}`" in LABELS["outcome"]
