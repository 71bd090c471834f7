"""What docs/deploy-kubernetes.md promises, checked on the rendered objects of every overlay."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.serving.health import LIVENESS
from loraline.core.serving.opening import open_platform
from loraline.inference.metrics import InferenceMetrics

STAGES = {"datagen", "trainer", "merger", "inference"}
RESTRICTED_VOLUMES = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return container


def test_pods_keep_to_the_restricted_profile(overlay: Any) -> None:
    labels = overlay.kind("Namespace")["loraline"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert set(overlay.pods()) >= STAGES
    for name, pod in overlay.pods().items():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec), name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert min(security["runAsUser"], security["runAsGroup"], security["fsGroup"]) > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= RESTRICTED_VOLUMES, name
        own = container_of(pod)["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert all("hostPort" not in port for port in container_of(pod)["ports"]), name


def test_the_images_user_is_the_pods_user(rendered: Any) -> None:
    root = Path(__file__).resolve().parents[2]
    for stage, pod in rendered["gpu"].stages().items():
        user = pod["spec"]["securityContext"]["runAsUser"]
        assert f"USER {user}\n" in (root / "services" / stage / "Dockerfile").read_text()


def test_accounts_have_no_token(overlay: Any) -> None:
    accounts = overlay.kind("ServiceAccount")
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    for name, pod in overlay.pods().items():
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        assert pod["spec"]["serviceAccountName"] == name, "one account for each, so that rights can be given to one"
    assert not overlay.kind("Role") and not overlay.kind("ClusterRole")


def test_secrets_come_by_reference_only(overlay: Any) -> None:
    assert not overlay.kind("Secret")
    for name, pod in overlay.pods().items():
        for variable in container_of(pod).get("env", []):
            secretive = re.search(r"PASSWORD|SECRET|KEY|TOKEN", variable["name"])
            if secretive and not variable["name"].endswith("_FILE"):
                assert "secretKeyRef" in variable["valueFrom"], f"{name}: {variable}"
    for config in overlay.kind("ConfigMap").values():
        for key, value in config.get("data", {}).items():
            if re.search(r"PASSWORD|SECRET|API_KEY|KEYS_|TOKEN", key):
                assert value.startswith("/run/secrets/"), key
            assert not re.search(r"://[^/@\s]+:[^/@\s]+@", value), f"a password in {key}"


def test_probes_are_native_and_no_restart_ends_work_for_want_of_a_database(overlay: Any) -> None:
    for name, pod in overlay.stages().items():
        container = container_of(pod)
        ports = {port["containerPort"] for port in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[kind]["grpc"]["port"] in ports, f"{name}: {kind}"
        assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
        assert "service" not in container["readinessProbe"]["grpc"], "ready as a whole: database and model"
        patience = container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"]
        assert patience >= 60, "a busy machine is no dead process"


def test_a_model_has_half_an_hour_to_load(rendered: Any) -> None:
    for overlay in rendered.values():
        probe = container_of(overlay.pods()["inference"])["startupProbe"]
        if overlay.name == "cpu":  # there it is loaded by request, which may come at any time
            assert probe["grpc"]["service"] == LIVENESS
        else:
            assert probe["grpc"].get("service", "") == "", "started when a token was generated"
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_pods_get_longer_to_stop_than_a_checkpoint(overlay: Any) -> None:
    for name, pod in overlay.stages().items():
        grace = float(overlay.environment(name)["LORALINE_STOP_GRACE_SECONDS"])
        before = container_of(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]
        # The server allows itself five seconds for jobs and calls, and five for the rest.
        assert pod["spec"]["terminationGracePeriodSeconds"] >= before + grace + 15, name
    assert float(overlay.environment("trainer")["LORALINE_STOP_GRACE_SECONDS"]) >= 240
    assert overlay.environment("trainer")["LORALINE_TRAINER_PUBLISH_CHECKPOINTS"] == "always"


def test_disruptions_come_one_at_a_time(overlay: Any) -> None:
    budgets = overlay.kind("PodDisruptionBudget")
    assert set(budgets) == STAGES
    for name, budget in budgets.items():
        labels = overlay.pods()[name]["metadata"]["labels"]
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert budget["spec"]["maxUnavailable"] == 1, "minAvailable 1 of 1 would block every drain of a node"
        rolling = overlay.workloads()[name]["spec"]["strategy"]["rollingUpdate"]
        assert sorted(rolling.values()) == [0, 1], name


def test_inference_goes_before_training(overlay: Any) -> None:
    classes = overlay.kind("PriorityClass")
    values = {name: classes[pod["spec"]["priorityClassName"]]["value"] for name, pod in overlay.pods().items()}
    assert values["inference"] > values["datagen"] == values["merger"] > values["trainer"]
    assert all(values[store] > values["inference"] for store in values if store not in STAGES)
    training = classes[overlay.pods()["trainer"]["spec"]["priorityClassName"]]
    assert training["preemptionPolicy"] == "Never"
    assert not any(c.get("globalDefault") for c in classes.values())


def test_gpus_are_limited_to_one_for_trainer_and_inference(overlay: Any) -> None:
    for name, pod in overlay.pods().items():
        limits = container_of(pod)["resources"]["limits"]
        wanted = 1 if overlay.name != "cpu" and name in ("trainer", "inference") else 0
        assert limits.get("nvidia.com/gpu", 0) == wanted, name
        assert "memory" in limits and {"cpu", "memory"} <= set(container_of(pod)["resources"]["requests"]), name
        tolerated = {toleration["key"] for toleration in pod["spec"].get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == bool(wanted), name
        flavour = container_of(pod)["image"].rpartition("-")[2]
        if name in ("trainer", "inference"):
            assert flavour == ("gpu" if wanted else "cpu")
            (shm,) = [v for v in pod["spec"]["volumes"] if v["name"] == "shm"]
            assert shm["emptyDir"]["medium"] == "Memory"
            assert shm["emptyDir"]["sizeLimit"]


def test_models_are_downloaded_once(overlay: Any) -> None:
    claim = overlay.kind("PersistentVolumeClaim")["model-cache"]["spec"]
    assert claim["accessModes"] == (["ReadWriteOnce"] if overlay.name == "cpu" else ["ReadWriteMany"])
    for name, pod in overlay.stages().items():
        mounts = {m["name"]: m["mountPath"] for m in container_of(pod)["volumeMounts"]}
        assert overlay.environment(name)["HF_HOME"].startswith(mounts["model-cache"] + "/"), name
        (data,) = [v for v in pod["spec"]["volumes"] if v["name"] == "data"]
        assert "ephemeral" in data, "two pods never share a data folder"


def test_every_setting_is_one_that_the_services_read(overlay: Any, unread: Any) -> None:
    for stage in STAGES:
        assert not unread(stage, overlay.environment(stage)), stage


def test_what_others_run_is_reached_by_tls(rendered: Any) -> None:
    for name in ("external-postgres-s3", "production"):
        for stage in STAGES:
            told = rendered[name].environment(stage)
            assert told["LORALINE_S3_SECURE"] == "true", f"{name}: {stage}"
            assert told["LORALINE_DATABASE_URL"].partition("?")[2] == "sslmode=require", f"{name}: {stage}"


def test_what_the_settings_name_is_what_the_network_lets_through(rendered: Any) -> None:
    for name in ("tracing", "production"):
        overlay = rendered[name]
        network = Network(overlay)
        for stage in STAGES:
            host, port = overlay.environment(stage)["OTEL_EXPORTER_OTLP_ENDPOINT"].removeprefix("http://").split(":")
            namespace = host.split(".")[1]
            network.places["named"] = (namespace, {"app.kubernetes.io/name": "opentelemetry-collector"}, "10.0.3.1")
            assert network.allows(stage, "named", int(port)), f"{name}: {stage} cannot reach {host}"
    assert Network(rendered["cpu"]).allows("datagen", "inference", 8000)
    service = rendered["cpu"].kind("Service")["inference"]["spec"]
    assert 8000 in {port["port"] for port in service["ports"]}, "LLM_BASE_URL=http://inference:8000/v1"


def test_sqlite_is_refused_with_more_than_one_replica(overlay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORALINE_")]:
        monkeypatch.delenv(name)
    for stage in STAGES:
        told = overlay.environment(stage)
        assert told["LORALINE_DATABASE_URL"].startswith("postgresql://")
        assert told["LORALINE_STORE_URL"].startswith("s3://")
        for key, value in told.items():
            if key != "LORALINE_DATABASE_PASSWORD_FILE":
                monkeypatch.setenv(key, value)
    assert CoreSettings().replicas > 1
    monkeypatch.setenv("LORALINE_DATABASE_URL", "sqlite:////var/lib/loraline/loraline.db")
    with pytest.raises(LoralineError) as refused:
        open_platform(CoreSettings())
    assert refused.value.reason == "REPLICAS_NEED_SHARED_STATE"


def test_replicas_follow_the_queues(rendered: Any) -> None:
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    exported = set(re.findall(r"^# TYPE (\S+)", generate_latest(registry).decode(), re.MULTILINE))
    for name in ("keda", "production"):
        overlay = rendered[name]
        scaled = overlay.kind("ScaledObject")
        assert set(scaled) == {"inference", "trainer"}
        for target, item in scaled.items():
            spec = item["spec"]
            assert spec["scaleTargetRef"]["name"] == target
            assert "replicas" not in overlay.kind("Deployment")[target]["spec"], "the next apply would set it back"
            assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
            assert [trigger["type"] for trigger in spec["triggers"]] == ["prometheus"]
        query = scaled["inference"]["spec"]["triggers"][0]["metadata"]["query"]
        assert "vllm:num_requests_waiting{" in query
        own = set(re.findall(r"loraline_\w+", query)) - {"loraline"}
        assert own and own <= exported
        assert "loraline_jobs{" in scaled["trainer"]["spec"]["triggers"][0]["metadata"]["query"]
    for name in set(rendered) - {"keda", "production"}:
        assert all(d["spec"]["replicas"] == 1 for d in rendered[name].kind("Deployment").values())


def test_kueue_queues_what_takes_gpus(rendered: Any) -> None:
    for name in ("kueue", "production"):
        overlay = rendered[name]
        priorities = {n: c["value"] for n, c in overlay.kind("WorkloadPriorityClass").items()}
        (queue,) = overlay.kind("LocalQueue")
        cluster = overlay.kind("ClusterQueue")[overlay.kind("LocalQueue")[queue]["spec"]["clusterQueue"]]["spec"]
        (group,) = cluster["resourceGroups"]
        assert cluster["preemption"] == {"withinClusterQueue": "LowerPriority"}
        assert group["flavors"][0]["name"] in overlay.kind("ResourceFlavor")
        for stage, workload in overlay.kind("Deployment").items():
            for labels in (workload["metadata"]["labels"], workload["spec"]["template"]["metadata"]["labels"]):
                wanted = queue if stage in ("trainer", "inference") else None
                assert labels.get("kueue.x-k8s.io/queue-name") == wanted
                assert (labels.get("kueue.x-k8s.io/priority-class") in priorities) == bool(wanted)
            if stage in ("trainer", "inference"):
                resources = container_of(workload["spec"]["template"])["resources"]
                asked = {*resources["requests"], *resources["limits"]}
                assert asked <= set(group["coveredResources"]), "Kueue admits only what its quota covers"
        assert priorities["loraline-inference"] > priorities["loraline-training"]


class Network:
    """Answers whether the policies of an overlay let a connection through."""

    def __init__(self, overlay: Any) -> None:
        self.policies = list(overlay.kind("NetworkPolicy").values())
        self.places: dict[str, tuple[str, dict[str, str], str]] = {
            name: ("loraline", pod["metadata"]["labels"], "10.0.0.5") for name, pod in overlay.pods().items()
        }
        """Name -> namespace, labels and address."""

    def allows(self, source: str, target: str, port: int, protocol: str = "TCP") -> bool:
        """Return whether both sides let it through."""
        return self._side("Egress", source, target, port, protocol) and self._side(
            "Ingress", target, source, port, protocol
        )

    def _side(self, direction: str, at: str, peer: str, port: int, protocol: str) -> bool:
        namespace, labels, _ = self.places[at]
        if namespace != "loraline":
            return True
        specs = [p["spec"] for p in self.policies]
        mine = [s for s in specs if direction in s["policyTypes"] and matches(s["podSelector"], labels)]
        assert mine, "default-deny selects every pod"
        key, far = ("egress", "to") if direction == "Egress" else ("ingress", "from")
        return any(
            any(p["port"] == port and p["protocol"] == protocol for p in rule["ports"])
            and any(self._is(entry, peer) for entry in rule[far])
            for spec in mine
            for rule in spec.get(key, [])
        )

    def _is(self, entry: dict[str, Any], peer: str) -> bool:
        namespace, labels, address = self.places[peer]
        if "ipBlock" in entry:
            block, here = entry["ipBlock"], ipaddress.ip_address(address)
            inside = here in ipaddress.ip_network(block["cidr"])
            return inside and not any(here in ipaddress.ip_network(e) for e in block.get("except", []))
        spaces = {"kubernetes.io/metadata.name": namespace}
        if namespace == "teams":
            spaces["loraline.dev/clients"] = "true"
        if "namespaceSelector" in entry:
            if not matches(entry["namespaceSelector"], spaces):
                return False
        elif namespace != "loraline":
            return False
        return matches(entry.get("podSelector", {}), labels)


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether a label selector takes the labels; only what the manifests use is known."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "Exists"
        if expression["key"] not in labels:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_the_network_lets_the_real_flows_through_and_nothing_else(overlay: Any) -> None:
    network = Network(overlay)
    places = network.places
    client = {"loraline.dev/client": "true"}
    places["client"] = ("loraline", client, "10.0.0.6")
    places["client of a team"] = ("teams", client, "10.0.0.7")
    places["client elsewhere"] = ("elsewhere", client, "10.0.0.8")
    places["stranger"] = ("loraline", {}, "10.0.0.9")
    places["prometheus"] = ("monitoring", {"app.kubernetes.io/name": "prometheus"}, "10.0.1.1")
    places["dns"] = ("kube-system", {"k8s-app": "kube-dns"}, "10.0.2.1")
    places["collector"] = ("observability", {"app.kubernetes.io/name": "opentelemetry-collector"}, "10.0.3.1")
    places["another collector"] = ("elsewhere", {"app.kubernetes.io/name": "opentelemetry-collector"}, "10.0.3.2")
    places["model of a team"] = ("teams", {"app": "model"}, "10.0.4.1")
    places["internet"] = ("outside", {}, "93.184.216.34")
    places["metadata service"] = ("outside", {}, "169.254.169.254")
    places["cluster API"] = ("default", {}, "10.96.0.1")
    places["managed database"] = ("outside", {}, "192.0.2.10")
    places["managed store"] = ("outside", {}, "192.0.2.20")
    external = "postgres" not in overlay.pods()
    watched = bool(overlay.kind("ServiceMonitor"))
    wanted: set[tuple[str, str, int]] = {("client", "inference", 8000), ("client of a team", "inference", 8000)}
    wanted |= {("client", "dns", 53), ("datagen", "inference", 8000)}
    traced = "OTEL_EXPORTER_OTLP_ENDPOINT" in overlay.environment("datagen")
    assert traced == (overlay.name in ("tracing", "production"))
    for stage in STAGES:
        wanted |= {("client", stage, 7600), ("client of a team", stage, 7600)}
        wanted |= {(stage, "internet", 443), (stage, "dns", 53)}
        wanted |= {(stage, "managed database", 443), (stage, "managed store", 443)}  # as all of the internet
        if external:
            wanted.add((stage, "managed database", 5432))
        else:
            wanted |= {(stage, "postgres", 5432), (stage, "minio", 9000)}
        if watched:
            wanted.add(("prometheus", stage, 9600))
        if traced:
            wanted |= {(stage, "collector", 4317), (stage, "collector", 4318)}
    ports = (53, 80, 443, 4317, 4318, 5432, 7600, 8000, 9000, 9600)
    inside = [name for name, place in places.items() if place[0] == "loraline"]
    found = {
        (source, target, port)
        for source in places
        for target in places
        for port in ports
        if source != target and (source in inside or target in inside) and network.allows(source, target, port)
    }
    assert found == wanted
    assert network.allows("trainer", "dns", 53, "UDP")
