"""`make check-monitoring`: the real services and a real Prometheus under a load; every query of every panel and alert.

Takes minutes and needs `prometheus`, which no PyPI package brings: so it is no part of `make test`. The quick half,
that every query parses and names only what exists, is test_monitoring_names.py.
LORALINE_MONITORING_PICTURES=docs/images draws the dashboards from what was measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import load_faults
import pytest
import yaml
from boards_platform import INFERENCE, OVERVIEW
from boards_stages import TRAINING
from dashboards import BOARDS
from load import ask_at_once, check_model, rows_of_a_model, run_line
from panels import Panel
from prometheus_api import PrometheusApi
from provider import priced_and_spent
from queries import fill_in, names_in

from loraline.client import Loraline
from loraline.core.serving.addresses import free_port
from pipeline_deployments import Deployment, four_services

ROOT = Path(__file__).resolve().parents[2]
# Series that only a GPU brings; an alert on them is proven by its history in test_alerts.py.
OF_A_GPU = {"loraline_gpu_memory_used_bytes", "loraline_gpu_memory_size_bytes"}
# What the faults at the load's end raise at once, each for what was done.
MUST_FIRE = {"DatagenQuotaExhausted", "MergeRefused"}
# What a small or busy machine may rightly raise.
MAY_FIRE = {"DiskAlmostFull", "DiskFillsSoon", "FirstTokensBurnFast", "FirstTokensBurnSlowly", "InferenceQueueGrows"}

pytestmark = pytest.mark.timeout(3600)


@dataclass
class Watched:
    """What a load left in Prometheus."""

    prometheus: PrometheusApi
    begin: float
    faults: float
    """Until then everything went well."""
    end: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    settings = load_faults.INFERENCE | load_faults.write_profiles(folder / "profiles")
    with priced_and_spent() as endpoints, four_services(folder, settings | endpoints) as deployment:
        url = _start_prometheus(deployment, folder)
        begin = time.time()
        with _connected(deployment) as client:
            base = _load(deployment, client, folder)
            time.sleep(5)
            faults = time.time()
            load_faults.meet_limits(client)
            load_faults.refuse_and_repair(client, folder)
            load_faults.pause_and_resume(client, base)
            load_faults.ask_amiss(deployment, client)
        time.sleep(8)  # the last scrape and evaluation
        yield Watched(PrometheusApi(url), begin, faults, time.time())


def _connected(deployment: Deployment) -> Loraline:
    environment = deployment.environment
    addresses = {stage: environment[f"LORALINE_{stage.upper()}_ADDRESS"] for stage in deployment.metrics}
    return Loraline.connect(addresses=addresses, key=deployment.key)


def _start_prometheus(deployment: Deployment, folder: Path) -> str:
    program = shutil.which("prometheus")
    assert program, "prometheus is not installed; Debian: apt-get install prometheus"
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(ROOT / "deploy/prometheus/rules/*.yml")]
    del config["alerting"]
    job = config["scrape_configs"][0]
    for entry in job["static_configs"]:
        entry["targets"] = [deployment.metrics[entry["labels"]["service"]]]
    config["scrape_configs"] = [job]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        deployment.processes["prometheus"] = subprocess.Popen(
            [
                program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return f"http://{address}"


def _load(deployment: Deployment, client: Loraline, folder: Path) -> str:
    """Run the healthy part of the load; returns the name under which the base is served."""
    example = folder / "example"
    shutil.copytree(ROOT / "examples/persona/raw", example / "raw")
    file = example / "pipeline.yaml"
    shutil.copy(Path(__file__).with_name("watched_persona.yaml"), file)
    run_line(deployment, file)
    base = next(model.name for model in client.inference.models() if not model.HasField("proof"))
    rows_of_a_model(client, base)
    check_model(client)
    ask_at_once(deployment, client)
    return base


def _series(watched: Watched, query: str) -> int:
    step = max(1.0, (watched.end - watched.begin) / 500)
    return len(watched.prometheus.over(fill_in(query), watched.begin, watched.end, step))


def test_everything_is_scraped_and_every_rule_evaluates(watched: Watched) -> None:
    targets = watched.prometheus.targets()
    assert {target["labels"]["service"]: target["health"] for target in targets} == dict.fromkeys(
        ("datagen", "trainer", "merger", "inference"), "up"
    )
    rules = watched.prometheus.rules()
    assert len(rules) > 40
    assert not [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"]


@pytest.mark.parametrize("panel", [p for b in BOARDS for p in b.panels], ids=lambda p: p.title)
def test_panel_shows_data(watched: Watched, panel: Panel) -> None:
    counts = {legend: _series(watched, query) for legend, query in panel.queries.items()}
    if panel.needs and not any(counts.values()):
        assert panel.needs == "GPU"
        pytest.skip("needs a GPU: its queries are answered, but this machine has none")
    assert all(counts.values()), f"{panel.title}: no data for {[legend for legend, n in counts.items() if not n]}"


def test_alerts_read_series_that_are_there(watched: Watched) -> None:
    for alert in watched.prometheus.rules():
        if alert["type"] == "alerting":
            watched.prometheus.over(alert["query"], watched.begin, watched.end, 5)
            for name in names_in(alert["query"]) - OF_A_GPU:
                assert _series(watched, name), f"{alert['name']}: {name} was never seen"


def _fired(watched: Watched, begin: float, end: float) -> set[str]:
    lines = watched.prometheus.over('ALERTS{alertstate="firing"}', begin, end, 1)
    return {line.labels["alertname"] for line in lines}


def test_a_healthy_run_raises_no_alert_and_faults_raise_theirs(watched: Watched) -> None:
    assert _fired(watched, watched.begin, watched.faults) <= MAY_FIRE
    fired = _fired(watched, watched.faults, watched.end)
    assert fired >= MUST_FIRE
    assert fired <= MUST_FIRE | MAY_FIRE


def test_series_of_runs_are_gone_when_the_run_is(watched: Watched) -> None:
    assert _series(watched, "loraline_training_loss") == 1
    assert watched.prometheus.now("loraline_training_loss") == []


def test_pictures(watched: Watched) -> None:
    folder = os.environ.get("LORALINE_MONITORING_PICTURES")
    if not folder:
        pytest.skip("LORALINE_MONITORING_PICTURES names no folder")
    from picture import draw

    Path(folder).mkdir(parents=True, exist_ok=True)
    shown = {
        "overview": (OVERVIEW, list(OVERVIEW.rows), watched.faults),  # what people see while all is well
        "training": (TRAINING, ["Runs that are live"], watched.end),
        "inference": (INFERENCE, ["Now", "Answers", "By adapter"], watched.end),
    }
    for name, (board, rows, end) in shown.items():
        file = Path(folder) / f"{name}.png"
        empty = draw(board, watched.prometheus, watched.begin, end, file, rows)
        assert empty == [], f"{file}: panels without data"
        assert file.stat().st_size < 300_000
