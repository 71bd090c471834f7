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
from queries import fill_in, labels_of_result, names_in

ROOT = Path(__file__).resolve().parents[2]
NOT_BASE_UNITS = re.compile(r"_(ms|millis|milliseconds|mib|gib|mb|gb|kb|percent|minutes|hours)(_|$)")
# The labels that scraping adds, and Prometheus' own series.
SCRAPED = {"instance", "job", "service"}
OWN = {"up": SCRAPED, "ALERTS": {*SCRAPED, "alertname", "alertstate", "severity"}}


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


@pytest.fixture(scope="module")
def labels_of(catalogue: list[Family]) -> dict[str, set[str]]:
    """Every series that a query may name, recorded ones among them, with the labels that it may carry."""
    known = {series: {*family.labels, *SCRAPED} for family in catalogue for series in family.series}
    for family in catalogue:
        if family.kind == "histogram":
            known[f"{family.name}_bucket"].add("le")
    known |= OWN
    for rule in _rules():
        if "record" in rule:  # rules stand after those that they read
            known[rule["record"]] = labels_of_result(rule["expr"], known)
    return known


def test_every_query_names_series_and_labels_that_are_there(labels_of: dict[str, set[str]]) -> None:
    for where, query in _queries():
        names = names_in(query)
        assert names <= set(labels_of), f"{where}: no service exports {sorted(names - set(labels_of))}"
        try:
            labels_of_result(query, labels_of)
        except ValueError as error:
            pytest.fail(f"{where}: {error}")


def test_legends_and_variables_name_labels_of_the_answers(labels_of: dict[str, set[str]]) -> None:
    for board in BOARDS:
        for name, series in board.variables.items():
            assert name in labels_of[series], f"{board.title}: {series} has no label {name} to choose by"
            assert any(f"${name}" in query for panel in board.panels for query in panel.queries.values()), name
        for panel in board.panels:
            for legend, query in panel.queries.items():
                missing = set(re.findall(r"\{\{(\w+)\}\}", legend)) - labels_of_result(fill_in(query), labels_of)
                assert not missing, f"{board.title}: {panel.title}: the answers have no {sorted(missing)}"
            chosen = {name for query in panel.queries.values() for name in re.findall(r"\$(?!__)\{?(\w+)", query)}
            assert chosen <= set(board.variables), f"{panel.title}: no such variable {chosen - set(board.variables)}"


def test_alerts_say_only_labels_that_they_have(labels_of: dict[str, set[str]]) -> None:
    for rule in _rules():
        said = set(re.findall(r"\$labels\.(\w+)", str(rule.get("annotations", {}))))
        missing = said - labels_of_result(rule["expr"], labels_of)
        assert not missing, f"{rule.get('alert')}: its text would leave {sorted(missing)} empty"


def test_a_typo_would_be_seen(catalogue: list[Family]) -> None:
    known = {series for family in catalogue for series in family.series}
    assert not names_in('sum(rate(loraline_inference_request_total{outcome="ok"}[5m]))') <= known
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum(x")


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ('x{kindd="y"}', "x has no label kindd"),
        ("sum by (oops) (rate(x[5m]))", "sum has no label oops"),
        ("sum by (state) (max by (kind) (x))", "sum has no label state"),
        ("x / on (instance) y", "one side of / has no label instance"),
        ('label_replace(x, "stage", "$1", "king", "(.*)")', "label_replace has no label king"),
        ("sum by (le) (histogram_quantile(0.5, x))", "sum has no label le"),
    ],
)
def test_a_label_that_is_not_there_is_named(query: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)):
        labels_of_result(query, {"x": {"kind", "state", "instance", "le"}, "y": {"kind"}})


def test_labels_of_answers() -> None:
    known = {"x": {"kind", "state"}, "up": {"service", "job"}}
    for query, wanted in {
        "sum by (kind) (rate(x[5m]))": {"kind"},
        "sum without (kind) (x)": {"state"},
        "sum(x) or vector(0)": set(),
        'label_replace(x, "stage", "$1", "kind", "(.*)")': {"kind", "state", "stage"},
        'absent(up{service="a",job!="b"})': {"service"},
        "topk(3, x) > 0.5": {"kind", "state"},
    }.items():
        assert labels_of_result(query, known) == wanted, query


def test_recorded_series_are_all_used() -> None:
    used = set.union(*(names_in(query) for _, query in _queries()))
    assert {rule["record"] for rule in _rules() if "record" in rule} <= used


def test_names_follow_the_rules_and_no_label_is_without_bound(catalogue: list[Family]) -> None:
    assert set(LABELS) == {"le"}.union(*(family.labels for family in catalogue)), "labels that nothing carries"
    for family in catalogue:
        assert re.fullmatch(r"(loraline|grpc_server|process|python)_[a-z0-9_]+|vllm:[a-z0-9_]+", family.name), family
        assert set(family.labels) <= set(LABELS), f"{family.name}: say what bounds {family.labels}"
        if not family.name.startswith("loraline_"):
            continue
        assert (family.kind == "counter") == family.name.endswith("_total"), family
        assert not NOT_BASE_UNITS.search(family.name), family
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
