"""The rendered objects are what Kubernetes and the operators know, and what they refer to is there."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import utils
from operator_schemas import WHOLE

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("1.30.0", "1.37.0")
"""From the oldest Kubernetes that has all that is used (preStop.sleep is on) to the newest that the schemas know."""
SECRETS = {
    "loraline-keys": {"api_keys.json"},
    "loraline-postgres": {"password"},
    "loraline-s3": {"access-key", "secret-key"},
    "loraline-llm": {"api-key"},
    "loraline-hub": {"token"},
}
"""Secrets that an operator makes, with their keys; docs/deploy-kubernetes.md has the commands."""


def departures(item: dict[str, Any]) -> list[str]:
    """Return where an operator's object is not what its definition says; KeyError for a kind without a schema."""
    validator = Draft202012Validator(WHOLE[f"{item['kind']} {item['apiVersion']}"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(item)]


@pytest.fixture(scope="module")
def known_schemas() -> Any:
    """Let the validator read each schema once instead of once for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def test_objects_are_strictly_what_the_schemas_say(rendered: Any, known_schemas: None) -> None:
    unique = {json.dumps(o, sort_keys=True): o for r in rendered.values() for o in r.objects}
    custom: set[str] = set()
    for item in unique.values():
        key = f"{item['kind']} {item['apiVersion']}"
        if key in WHOLE:
            custom.add(key)
            assert departures(item) == [], key
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(item, version, strict=True)
    assert len(unique) > 60
    assert custom == set(WHOLE), "a schema that nothing is checked by"


def test_the_check_of_schemas_refuses_what_it_should(rendered: Any, known_schemas: None) -> None:
    deployment = json.loads(json.dumps(rendered["gpu"].kind("Deployment")["trainer"]))
    deployment["spec"]["template"]["spec"]["restartpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartpolicy"):
        kubernetes_validate.validate(deployment, VERSIONS[1], strict=True)


@pytest.mark.parametrize(
    ("kind", "name", "path", "wrong", "says"),
    [
        ("ScaledObject", "inference", "spec.maxReplicas", 3, "unexpected"),
        ("ScaledObject", "inference", "spec.pollingInterval", "15", "not of type"),
        ("ScaledObject", "inference", "spec.fallback.behavior", "ifHigher", "not one of"),
        ("ScaledObject", "inference", "spec.triggers.0.metadata.threshold", None, "required"),
        ("ScaledObject", "inference", "spec.triggers.0.metadata.threshold", "eight", "does not match"),
        ("ServiceMonitor", "loraline", "spec.endpoints.0.interval", "15", "does not match"),
        ("ServiceMonitor", "loraline", "spec.selector.matchExpressions.0.operator", "Is", "not one of"),
        ("PrometheusRule", "loraline", "spec.groups.0.rules.0.expr", None, "required"),
        ("PrometheusRule", "loraline", "spec.groups.0.rules.0.record", "both", "not valid under any"),
        ("ClusterQueue", "loraline", "spec.preemption.withinClusterQueue", "Lower", "not one of"),
        ("LocalQueue", "loraline", "spec.clusterQueue", None, "required"),
        ("WorkloadPriorityClass", "loraline-training", "value", 2**31, "greater than"),
    ],
)
def test_wrong_objects_of_operators_are_found(
    rendered: Any, kind: str, name: str, path: str, wrong: Any, says: str
) -> None:
    item = json.loads(json.dumps(rendered["production"].kind(kind)[name]))
    assert departures(item) == []
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = item
    for part in way:
        place = place[part]
    if wrong is None:
        del place[last]
    else:
        place[last] = wrong
    (found,) = departures(item)
    assert says in found


def test_names_are_unique_and_in_one_namespace(overlay: Any) -> None:
    seen: set[tuple[str, str]] = set()
    cluster = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"}
    for item in overlay.objects:
        key = (item["kind"], item["metadata"]["name"])
        assert key not in seen
        seen.add(key)
        assert item["metadata"].get("namespace") == (None if item["kind"] in cluster else "loraline"), key


def test_what_pods_refer_to_is_there(overlay: Any) -> None:
    claims, maps = overlay.kind("PersistentVolumeClaim"), overlay.kind("ConfigMap")
    for name, pod in overlay.pods().items():
        spec = pod["spec"]
        assert spec["serviceAccountName"] in overlay.kind("ServiceAccount"), name
        assert spec["priorityClassName"] in overlay.kind("PriorityClass"), name
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        templates = overlay.workloads()[name]["spec"].get("volumeClaimTemplates", [])
        mountable = {*volumes, *(template["metadata"]["name"] for template in templates)}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            for secret, keys in secret_sources(volume):
                assert keys <= SECRETS[secret], f"{name}: {secret}"
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == mountable, name
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in maps, name
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in SECRETS[reference["name"]]


def secret_sources(volume: dict[str, Any]) -> list[tuple[str, set[str]]]:
    """Return the secrets of a volume with the keys that it takes from them."""
    found = []
    if "secret" in volume:
        found.append((volume["secret"]["secretName"], volume["secret"]["items"]))
    for source in volume.get("projected", {}).get("sources", []):
        found.append((source["secret"]["name"], source["secret"]["items"]))
    return [(name, {item["key"] for item in items}) for name, items in found]


def test_services_find_pods_and_their_ports(overlay: Any) -> None:
    for name, service in overlay.kind("Service").items():
        selector = service["spec"]["selector"]
        found = [p for p in overlay.pods().values() if selector.items() <= p["metadata"]["labels"].items()]
        assert len(found) == 1, name
        ports = {port["name"] for c in found[0]["spec"]["containers"] for port in c["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name
    for name, workload in overlay.workloads().items():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items(), name
        if workload["kind"] == "StatefulSet":
            assert overlay.kind("Service")[workload["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"


def test_images_have_versions(overlay: Any) -> None:
    for name, pod in overlay.pods().items():
        for container in pod["spec"]["containers"]:
            assert re.search(r":[A-Za-z.]*\d+[.-]\d+", container["image"]), f"{name}: {container['image']}"


def test_prometheus_is_told_every_stage(rendered: Any) -> None:
    for name in ("monitoring", "keda", "production"):
        overlay = rendered[name]
        monitor = overlay.kind("ServiceMonitor")["loraline"]["spec"]
        assert monitor["selector"] == {"matchExpressions": [{"key": "loraline.dev/stage", "operator": "Exists"}]}
        told = {
            service["spec"]["selector"]["app.kubernetes.io/name"]
            for service in overlay.kind("Service").values()
            if "loraline.dev/stage" in service["metadata"]["labels"]
            and monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
        }
        assert told == set(overlay.stages())
        # As in deploy/prometheus/prometheus.yml: `service` is the stage (the operator takes the Service's name).
        assert monitor["endpoints"][0]["relabelings"] == [{"targetLabel": "job", "replacement": "loraline"}]


def test_rules_and_dashboards_are_those_of_the_compose_deployment(rendered: Any) -> None:
    command = [sys.executable, "deploy/kubernetes/make_monitoring.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    overlay = rendered["monitoring"]
    (rule,) = overlay.kind("PrometheusRule").values()
    assert sum("alert" in r for group in rule["spec"]["groups"] for r in group["rules"]) >= 10
    boards = [m for m in overlay.kind("ConfigMap").values() if m["metadata"]["labels"].get("grafana_dashboard") == "1"]
    files = {name: json.loads(text) for board in boards for name, text in board["data"].items()}
    wanted = {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert wanted
    assert files == wanted
    # `kubectl apply` writes the object into an annotation, which has 256 KiB.
    assert max(len(json.dumps(board)) for board in boards) < 256 * 1024


def test_the_documented_commands_make_the_secrets_that_pods_mount(rendered: Any) -> None:
    page = (ROOT / "docs/deploy-kubernetes.md").read_text()
    made: dict[str, set[str]] = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*)$", page, re.MULTILINE):
        made[name] = set(re.findall(r"--from-(?:file|literal)=([^=\s]+)", rest))
    assert made == SECRETS
    mounted = {
        secret
        for pod in rendered["gpu"].pods().values()
        for volume in pod["spec"]["volumes"]
        for secret, _ in secret_sources(volume)
    }
    assert mounted == set(SECRETS)


def test_the_documented_overlay_of_ones_own_renders(tmp_path: Path) -> None:
    page = (ROOT / "docs/deploy-kubernetes.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    relative = os.path.relpath(ROOT / "deploy", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(textwrap.dedent(block).replace("../deploy", relative))
    kubectl = Path(sys.executable).with_name("kubectl")
    made = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("image: REGISTRY/loraline/") == 4
    assert "REGISTRY/loraline/trainer:0.1.0-gpu" in made.stdout
    settings = next(
        o for o in yaml.safe_load_all(made.stdout) if o["metadata"]["name"].startswith("inference-settings")
    )
    assert settings["data"]["LORALINE_INFERENCE_MODEL"] == "model/mareva@production"
    assert settings["data"]["LORALINE_STOP_GRACE_SECONDS"] == "120"
    assert made.stdout.count(settings["metadata"]["name"]) == 2, "the pods use the changed settings"


def test_every_overlay_is_documented() -> None:
    page = (ROOT / "docs/deploy-kubernetes.md").read_text()
    overlays = {path.parent.name for path in ROOT.glob("deploy/kubernetes/overlays/*/kustomization.yaml")}
    assert {name for name in overlays if f"| `{name}` |" in page} == overlays
