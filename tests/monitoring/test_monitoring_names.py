"""No typo survives: every query of a panel or rule parses and names only series and labels that the services have."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from boards_platform import INFERENCE, OVERVIEW, PLATFORM
from catalogue import LABELS, VLLM, Family, families, render
from dashboards import BOARDS, main
from queries import fill_in, labels_in, names_in

ROOT = Path(__file__).resolve().parents[2]
NOT_BASE_UNITS = re.compile(r"_(ms|millis|milliseconds|mib|gib|mb|gb|kb|percent|minutes|hours)(_|$)")
# Prometheus' own, and the labels that scraping and rules add.
OWN = {"up", "ALERTS"}
ADDED = {"instance", "job", "service", "le", "alertname", "alertstate", "stage"}


@pytest.fixture(scope="module")
def catalogue() -> list[Family]:
    return families()


def _rules() -> Iterator[dict[str, Any]]:
    for file in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def _queries() -> Iterator[tuple[str, str]]:
    for board in BOARDS:
        for panel in board.panels:
            for query in panel.queries.values():
                yield f"{board.title}: {panel.title}", fill_in(query)
    for rule in _rules():
        yield rule.get("alert") or rule["record"], rule["expr"]


def test_every_query_parses_and_names_what_is_there(catalogue: list[Family]) -> None:
    labels_of = {series: {*family.labels, *ADDED} for family in catalogue for series in family.series}
    recorded = {rule["record"] for rule in _rules() if "record" in rule}
    known = OWN | recorded | set(labels_of)
    for where, query in _queries():
        names = names_in(query)
        assert names <= known, f"{where}: no service exports {sorted(names - known)}"
        if names <= set(labels_of):
            allowed = set.union(*(labels_of[name] for name in names)) if names else set()
            assert labels_in(query) <= allowed, f"{where}: no such label {sorted(labels_in(query) - allowed)}"


def test_a_typo_would_be_seen(catalogue: list[Family]) -> None:
    known = {series for family in catalogue for series in family.series}
    assert not names_in('sum(rate(loraline_inference_request_total{outcome="ok"}[5m]))') <= known
    assert labels_in('sum by (oops) (rate(x{kindd="y"}[5m])) / on (hm) z') == {"oops", "kindd", "hm"}
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum(x")


def test_recorded_series_are_all_used() -> None:
    used = set.union(*(names_in(query) for _, query in _queries()))
    assert {rule["record"] for rule in _rules() if "record" in rule} <= used


def test_names_follow_the_rules_and_no_label_is_without_bound(catalogue: list[Family]) -> None:
    for family in catalogue:
        assert re.fullmatch(r"(loraline|grpc_server|process|python)_[a-z0-9_]+|vllm:[a-z0-9_]+", family.name), family
        assert set(family.labels) <= set(LABELS), f"{family.name}: say what bounds {family.labels}"
        if not family.name.startswith("loraline_"):
            continue
        assert (family.kind == "counter") == family.name.endswith("_total"), family
        assert not re.search(r"_(ms|millis|milliseconds|mib|gib|mb|gb|kb|percent|minutes|hours)(_|$)", family.name), (
            family
        )
        assert family.text.endswith("."), f"{family.name}: the text is no sentence"
        assert not {"job", "job_id", "name", "id", "request_id", "user", "key"} & set(family.labels), family
        assert ("run" in family.labels) == family.name.startswith("loraline_training_"), (
            "runs are labels of live gauges only"
        )
        if family.kind == "histogram":
            assert family.unit == "seconds", family


def test_the_metrics_page_is_fresh(catalogue: list[Family]) -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == render(catalogue), "run: .venv/bin/python tools/monitoring/catalogue.py docs/metrics.md"


def test_vllm_has_the_metrics_that_the_dashboards_use() -> None:
    """Read from vLLM's source: importing it takes ten seconds."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed here")
    folder = Path(next(iter(found.submodule_search_locations))) / "v1/metrics"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    for name in VLLM:
        assert f'"{name.removesuffix("_total")}"' in source, f"this vLLM has no {name}"


def test_committed_dashboards_are_what_python_writes(tmp_path: Path) -> None:
    main(tmp_path)
    committed = ROOT / "deploy/grafana/dashboards"
    assert {p.name for p in committed.glob("*.json")} == {p.name for p in tmp_path.glob("*.json")}
    for made in tmp_path.glob("*.json"):
        assert made.read_text() == (committed / made.name).read_text(), (
            "run: .venv/bin/python tools/monitoring/dashboards.py"
        )


def test_dashboards_are_whole() -> None:
    uids = [board.uid for board in BOARDS]
    assert len(set(uids)) == 6
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    known = {entry["uid"] for entry in source["datasources"]}
    for board in BOARDS:
        file = ROOT / f"deploy/grafana/dashboards/{board.uid.removeprefix('loraline-')}.json"
        model = json.loads(file.read_text())
        panels = [panel for panel in model["panels"] if panel["type"] != "row"]
        assert [panel["title"] for panel in panels] == [panel.title for panel in board.panels]
        assert len({panel["id"] for panel in model["panels"]}) == len(model["panels"])
        assert {panel["datasource"]["uid"] for panel in panels} <= known
        cells: set[tuple[int, int]] = set()
        for panel in model["panels"]:
            place = panel["gridPos"]
            mine = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not mine & cells, f"{board.title}: {panel['title']} lies on another panel"
            assert max(x for x, _ in mine) < 24
            cells |= mine
    assert {board.title for board in (OVERVIEW, INFERENCE, PLATFORM)} < {board.title for board in BOARDS}
