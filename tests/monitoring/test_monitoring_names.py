"""No typo survives: every query of a panel or rule parses and names only series and labels that the services have."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from alert_cases import SERVERS_FAULTS
from boards_platform import INFERENCE, OVERVIEW, PLATFORM
from catalogue import LABELS, VLLM, Family, families, render
from dashboards import BOARDS, main
from queries import fill_in, labels_of_result, names_in, values_in

from loraline.api.job.v1.job_pb2 import JobState
from loraline.core.jobs.model import state_name
from loraline.core.serving.grpc_metrics import _CODES
from loraline.core.serving.interceptor import _GRPC_TYPES
from loraline.datagen.publish.outcomes import ACCEPTED, REFUSED, TOLD_BESIDES

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


def _words(*folders: str) -> set[str]:
    """Return the texts that a program gives to calls or to names; what it only compares with is none of them."""
    found: set[str] = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "metrics.py":  # it shows series before anything is counted: that makes no value real
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                given: list[ast.expr] = []
                if isinstance(node, ast.Call):
                    given = [*node.args, *(keyword.value for keyword in node.keywords)]
                elif isinstance(node, ast.Assign):
                    given = [node.value]
                given += [branch for one in given if isinstance(one, ast.IfExp) for branch in (one.body, one.orelse)]
                found |= {one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return found


Values = dict[tuple[str, str], set[str]]
CORE = "packages/core/src"


@pytest.fixture(scope="module")
def values_of(catalogue: list[Family]) -> Values:
    """What the labels can be, by series and label: shown by fresh servers, or said by the code that counts."""
    known: Values = {}
    for series, label, value in set[tuple[str, str, str]]().union(*(family.shown for family in catalogue)):
        known.setdefault((series, label), set()).add(value)
    inference, datagen = _words("services/inference/src", CORE), _words("services/datagen/src", CORE)
    known["loraline_inference_requests_total", "outcome"] = {word for word in inference if word.isupper()}
    for series, label in (("adapter_loads_total", "result"), ("refused_total", "reason")):
        known[f"loraline_inference_{series}", label] &= inference  # shown, and given to somebody as well
    known["loraline_datagen_rows_total", "outcome"] = {ACCEPTED, *TOLD_BESIDES, *REFUSED}
    known["loraline_datagen_pauses_total", "reason"] = {word for word in datagen if word.isupper()}
    known["loraline_datagen_requests_total", "result"] = datagen
    known["grpc_server_handled_total", "grpc_code"] = set(_CODES.values())
    known["grpc_server_handling_seconds_bucket", "grpc_type"] = set(_GRPC_TYPES.values())
    known["loraline_http_key_refusals_total", "part"] = known["loraline_ready", "part"]
    states = {state_name(state).lower() for state in JobState.values() if state}
    known["loraline_job_duration_seconds_count", "state"] &= states
    kinds = known["loraline_jobs_submitted_total", "kind"]
    for recorded in ("kind:loraline_jobs:max", "kind:loraline_job_queue_age_seconds:max", "loraline_jobs"):
        known |= {(recorded, "state"): states, (recorded, "kind"): kinds}
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    services = {one["labels"]["service"] for job in scraped for one in job["static_configs"]}
    for series in ("up", "process_cpu_seconds_total", "process_resident_memory_bytes"):
        known[series, "service"] = services | {"loraline"}  # `loraline up`: a comment in that file
    known["ALERTS", "alertstate"] = {"firing", "pending"}  # Prometheus' own
    return known


def _unknown(query: str, known: Values) -> list[str]:
    """Return the selectors of a query that no series can fit."""
    return [
        f'{series}{{{label}="{value}"}}'
        for series, label, value in sorted(values_in(query))
        if value not in (".*", ".+") and not any(re.fullmatch(value, one) for one in known.get((series, label), ()))
    ]


def test_every_query_asks_for_values_that_the_code_gives(values_of: Values) -> None:
    for where, query in _queries():
        assert not _unknown(query, values_of), f"{where}: nothing says {_unknown(query, values_of)}"


@pytest.mark.parametrize(
    "query",
    [
        'loraline_trainer_runs_total{verdict="divergent"}',
        'loraline_trainer_checkpoints_total{result=~"torn|unsent"}',
        'loraline_inference_adapter_loads_total{result=~"PROOF_FAILED|RECEIPT_DIFFERS"}',
        'loraline_inference_requests_total{outcome=~"INTERNAL|MOTOR_.*"}',
        'loraline_inference_requests_total{outcome="QUEUE_IS_FULL"}',
        'loraline_datagen_pauses_total{reason!~"BUDGET_SPENT|LLM_CANDIDATES_EXHAUSTED"}',
        'loraline_datagen_rows_total{outcome!~"accepted|polished"}',
        'loraline_inference_time_to_first_token_seconds_bucket{le="2"}',
        'loraline_job_duration_seconds_count{state="broken"}',
        'kind:loraline_jobs:max{kind="trainer.tune"}',
        'loraline_ready{part="postgres"}',
        'up{service="tuner"}',
        'loraline_inference_sessions{owner="x"}',
    ],
)
def test_a_value_that_nothing_gives_is_named(query: str, values_of: Values) -> None:
    assert len(_unknown(query, values_of)) == 1


def test_windows_of_the_error_budget_count_the_same_outcomes() -> None:
    asked = {
        rule["record"]: frozenset(value for _, label, value in values_in(rule["expr"]) if label == "outcome")
        for rule in _rules()
        if rule.get("record", "").startswith("inference:errors:")
    }
    assert len(asked) == 4
    assert len(set(asked.values())) == 1


def test_the_error_budget_counts_every_failure_of_the_server() -> None:
    """The histories hold every outcome that the pattern names, so that a pattern without histories cannot come in."""
    rule = next(rule for rule in _rules() if rule.get("record") == "inference:errors:ratio_rate5m")
    patterns = {value for _, label, value in values_in(rule["expr"]) if label == "outcome"}
    idle = {pattern for pattern in patterns if not any(re.fullmatch(pattern, one) for one in SERVERS_FAULTS)}
    assert not idle, f"no history in alert_cases.py has {idle}"


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
