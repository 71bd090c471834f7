"""KEDA's queries: they name only series and labels that are there, and count what waits when half of it is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from catalogue import families
from programs import program
from queries import labels_of_result, names_in

ROOT = Path(__file__).resolve().parents[2]
BY_THE_OPERATOR = {"namespace", "pod", "container", "endpoint", "instance", "job", "service"}
"""Labels that the Prometheus operator puts on everything it scrapes."""
TRAINER = 'namespace="loraline",kind="trainer.train",state='
QUEUED = 'loraline_inference_queued_requests{namespace="loraline",pod="a"}'
VLLM = 'vllm:num_requests_waiting{namespace="loraline",engine="0",model_name="m"}'


def _queries() -> dict[str, str]:
    file = ROOT / "deploy/kubernetes/components/keda/scaledobjects.yaml"
    objects = [item for item in yaml.safe_load_all(file.read_text()) if item]
    return {item["metadata"]["name"]: item["spec"]["triggers"][0]["metadata"]["query"] for item in objects}


def test_scaling_queries_name_only_what_is_there() -> None:
    known = {series: {*family.labels, *BY_THE_OPERATOR} for family in families() for series in family.series}
    queries = _queries()
    assert set(queries) == {"inference", "trainer"}
    for target, query in queries.items():
        names = names_in(query)
        assert names <= set(known), f"{target}: no service exports {sorted(names - set(known))}"
        labels_of_result(query, known)


CASES: list[tuple[str, dict[str, str], float]] = [
    ("inference", {QUEUED: "12x5"}, 12),  # the engine starts: vLLM exports nothing yet
    ("inference", {VLLM: "7x5"}, 7),
    ("inference", {QUEUED: "12x5", VLLM: "7x5"}, 19),
    ("inference", {}, 0),
    # Two trainers tell the same of one table.
    (
        "trainer",
        {f'loraline_jobs{{pod="{pod}",{TRAINER}"{state}"}}': "2x5" for pod in "ab" for state in ("queued", "running")},
        4,
    ),
    ("trainer", {f'loraline_jobs{{{TRAINER}"succeeded"}}': "9x5"}, 0),
    ("trainer", {}, 0),
]


@pytest.mark.parametrize(("target", "series", "wanted"), CASES)
def test_what_waits_counts(target: str, series: dict[str, str], wanted: float, tmp_path: Path) -> None:
    case: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": _queries()[target], "eval_time": "3m", "exp_samples": [{"labels": "{}", "value": wanted}]}
        ],
    }
    file = tmp_path / "case.yml"
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "1m", "tests": [case]}))
    done = subprocess.run([program("promtool"), "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
