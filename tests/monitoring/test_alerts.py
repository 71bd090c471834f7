"""Each alert fires when it should and only then, in Prometheus' own evaluation; the configuration is what it reads.

promtool has no package on PyPI. Where it is missing the histories cannot be evaluated and those tests are skipped;
that every query parses and names only metrics that exist is tested without it, in test_monitoring_names.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from alert_cases import FIRES, STAGES, STAYS_QUIET, Case
from programs import program

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/prometheus/rules"


def _alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


NAMES = [alert["alert"] for alert in _alerts()]


def test_every_alert_has_histories_and_a_place_in_the_handbook() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert set(FIRES) == set(STAYS_QUIET) == set(NAMES)
    page = (ROOT / "docs/operate.md").read_text()
    for alert in _alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/operate.md#{alert['alert'].lower()}"
        assert f"\n### {alert['alert']}\n" in page, f"docs/operate.md does not say what to do at {alert['alert']}"
        assert alert["labels"]["severity"] in ("page", "ticket", "info")
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}


def _series(case: Case) -> dict[str, str]:
    """A case's series, and every stage up of which it says nothing."""
    told = {stage for stage in STAGES if any(f'service="{stage}"' in name for name in case.series if name[:3] == "up{")}
    up = {
        f'up{{instance="{stage[0]}:9600",job="loraline",service="{stage}"}}': "1x600"
        for stage in STAGES
        if stage not in told and stage not in case.gone
    }
    return case.series | up


def _evaluate(folder: Path, *cases: tuple[Case, list[str]]) -> subprocess.CompletedProcess[str]:
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in _series(case).items()],
            "promql_expr_test": [
                {
                    "expr": 'sum by (alertname) (ALERTS{alertstate="firing"}) > bool 0',
                    "eval_time": f"{case.minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in expected],
                }
            ],
        }
        for case, expected in cases
    ]
    rules = [str(path) for path in sorted(RULES.glob("*.yml"))]
    file = folder / "case.yml"
    file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run([program("promtool"), "test", "rules", str(file)], capture_output=True, text=True)


def _firing(name: str) -> list[Case]:
    cases = FIRES[name]
    return [cases] if isinstance(cases, Case) else cases


@pytest.mark.parametrize("name", NAMES)
def test_alert_fires_and_only_then(name: str, tmp_path: Path) -> None:
    fires = [(case, sorted([name, *case.also])) for case in _firing(name)]
    quiet = [(case, []) for case in STAYS_QUIET[name]]
    done = _evaluate(tmp_path, *fires, *quiet)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_history_that_expects_nothing_is_refused_when_the_alert_fires(tmp_path: Path) -> None:
    """The harness can fail: else a typo in it would let everything pass."""
    assert _evaluate(tmp_path, (_firing("ServiceDown")[0], [])).returncode != 0
    assert _evaluate(tmp_path, (STAYS_QUIET["ServiceDown"][0], ["ServiceDown"])).returncode != 0


def test_prometheus_reads_its_configuration() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "config", str(ROOT / "deploy/prometheus/prometheus.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(NAMES)} rules found" in done.stdout


def test_alertmanager_reads_its_configuration_and_sends_pages_first() -> None:
    amtool, file = program("amtool"), str(ROOT / "deploy/alertmanager/alertmanager.yml")
    done = subprocess.run([amtool, "check-config", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for severity, receiver in (("page", "page"), ("ticket", "ticket"), ("info", "shown-only")):
        told = subprocess.run(
            [amtool, "config", "routes", "test", f"--config.file={file}", f"severity={severity}"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert told.stdout.split() == [receiver]


def test_compose_names_what_prometheus_scrapes_and_alerts() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "loraline")
    targets = {entry["targets"][0]: entry["labels"]["service"] for entry in job["static_configs"]}
    assert targets == {f"{stage}:9600": stage for stage in ("datagen", "trainer", "merger", "inference")}
    manager = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"][0]
    assert {manager.partition(":")[0], *targets.values()} <= set(compose)
