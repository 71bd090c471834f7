"""The compose file's promises, read from the file, and the secrets it needs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraline.core.config import CoreSettings
from loraline.core.serving.auth import KeyRing
from loraline.inference.config import InferenceSettings
from loraline.inference.system_prompts import SystemPrompts

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("datagen", "trainer", "merger", "inference")
FILES = ("docker-compose.yml", "deploy/compose/gpu.yml")
VARIABLE = re.compile(r"\$\{([A-Z0-9_]+):-([^}]*)\}")
CONTAINER_PORTS = {
    **{stage: {"7600"} for stage in STAGES},
    "inference": {"7600", "8000"},
    "prometheus": {"9090"},
    "alertmanager": {"9093"},
    "grafana": {"3000"},
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def with_defaults(text: str) -> str:
    return VARIABLE.sub(lambda match: match[2], str(text))


@pytest.mark.parametrize("file", FILES)
def test_files_are_what_the_compose_specification_says(file: str) -> None:
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    checked = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_locked_down(compose: dict[str, Any], stage: str) -> None:
    service = compose["services"][stage]
    assert service["read_only"] is True
    assert {name: c["condition"] for name, c in service["depends_on"].items()} == {
        "postgres": "service_healthy",
        "minio": "service_healthy",
    }
    assert with_defaults(service["cpus"]) == "0", "all CPUs unless .env says less"


def test_every_container_has_limits_and_few_rights(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.fullmatch(r"\d+[mg]", with_defaults(service["mem_limit"])), name
        assert service["pids_limit"] > 0, name
        assert service["restart"] == "unless-stopped", name
        assert service["logging"]["options"]["max-size"], f"{name}: its log would fill the disk"
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert service.get("network_mode") is None, name


def test_only_needed_ports_are_published_and_on_loopback_only(compose: dict[str, Any]) -> None:
    published: dict[str, set[str]] = {}
    hosts: list[str] = []
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            address, host, container = with_defaults(port).split(":")
            assert address == "127.0.0.1", f"{name}: {port}"
            published.setdefault(name, set()).add(container)
            hosts.append(host)
    assert published == CONTAINER_PORTS
    assert len(hosts) == len(set(hosts)), "two containers on one port"


def test_no_secret_stands_in_the_environment(compose: dict[str, Any]) -> None:
    checked = 0
    for name, service in compose["services"].items():
        given = {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}
        for key, value in service.get("environment", {}).items():
            if any(word in key for word in ("PASSWORD", "SECRET", "API_KEY", "KEYS", "TOKEN")):
                assert key.endswith(("_FILE", "_TOKEN_PATH")), f"{name}: {key}"
                assert str(value) in given, f"{name}: {key} names a secret that the container does not get"
                checked += 1
    assert checked > 10
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("./deploy/compose/secrets/")


def test_images_are_pinned_by_a_variable(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        image = with_defaults(service["image"])
        assert VARIABLE.search(service["image"]), f"{name}: {image}"
        tag = image.rpartition(":")[2]
        assert re.search(r"\d+[.-]\d+", tag), f"{name}: {image} is no exact version"


def test_images_are_built_on_one_exact_python() -> None:
    bases = {stage: (ROOT / "services" / stage / "Dockerfile").read_text() for stage in STAGES}
    named = {stage: re.findall(r"^ARG PYTHON_IMAGE=(.*)$", text, re.MULTILINE) for stage, text in bases.items()}
    assert len({tuple(images) for images in named.values()}) == 1, named
    for stage, (image,) in named.items():
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", image), f"{stage}: {image} floats"
        built_on = re.findall(r"^FROM (\S+)", bases[stage], re.MULTILINE)
        assert set(built_on) == {"${PYTHON_IMAGE}"}, stage


def test_what_is_waited_for_has_a_health_check(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for awaited, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy", f"{name} waits for {awaited}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_checked_as_their_images_are(compose: dict[str, Any], stage: str) -> None:
    """Images in OCI's format, as podman builds them, have no check of their own."""
    dockerfile = (ROOT / "services" / stage / "Dockerfile").read_text()
    found = re.search(r"^HEALTHCHECK ([^\\]+)\\\n\s+CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert found
    options = dict(option.removeprefix("--").split("=") for option in found[1].split())
    given = compose["services"][stage]["healthcheck"]
    assert given["test"] == ["CMD", *json.loads(found[2])]
    assert {name.replace("_", "-"): str(value) for name, value in given.items() if name != "test"} == options


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_one_that_the_services_read(compose: dict[str, Any], stage: str, unread: Any) -> None:
    assert not unread(stage, compose["services"][stage]["environment"])
    assert unread(stage, ["LORALINE_MAX_CONCURRENT_JOB"]), "the check sees typos"


def test_limits_are_the_services_own_until_somebody_sets_them(compose: dict[str, Any]) -> None:
    told = {name: with_defaults(text) for name, text in compose["services"]["inference"]["environment"].items()}
    fields = InferenceSettings.model_fields
    for name in ("max_model_len", "max_loaded_adapters", "gpu_memory_utilization", "kv_cache_gib"):
        assert float(told[f"LORALINE_INFERENCE_{name.upper()}"]) == fields[name].default, name
    jobs = CoreSettings.model_fields["max_concurrent_jobs"].default
    for stage in STAGES:
        given = compose["services"][stage]["environment"]
        assert int(with_defaults(given["LORALINE_MAX_CONCURRENT_JOBS"])) == jobs, stage


def test_system_prompts_are_a_file_that_inference_reads(compose: dict[str, Any]) -> None:
    service = compose["services"]["inference"]
    mounts = [with_defaults(mount).split(":") for mount in service["volumes"]]
    (source,) = [source for source, inside, *_ in mounts if inside.endswith("system_prompts.yaml")]
    assert [source, service["environment"]["LORALINE_INFERENCE_SYSTEM_PROMPTS_FILE"], "ro"] in mounts
    SystemPrompts.load(ROOT / source)  # refuses what it cannot read


def test_mounts_are_named_volumes_or_files_of_this_repository(compose: dict[str, Any]) -> None:
    used: set[str] = set()
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            source, _, rest = with_defaults(mount).partition(":")
            if source.startswith("."):
                assert rest.endswith(":ro"), f"{name}: {mount}"
                there = (ROOT / source).is_file() or any((ROOT / source).rglob("*.*"))
                assert there, f"{name}: nothing is in {source}"
            else:
                used.add(source)
    assert used == set(compose["volumes"])


def test_prometheus_scrapes_every_stage(compose: dict[str, Any]) -> None:
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    groups = [group for job in configuration["scrape_configs"] for group in job.get("static_configs", [])]
    targets = {target for group in groups for target in group["targets"]}
    assert {f"{stage}:9600" for stage in STAGES} <= targets
    assert {target.partition(":")[0] for target in targets} <= {*compose["services"], "localhost", "127.0.0.1"}
    alerting = str(configuration["alerting"])
    assert "alertmanager:9093" in alerting


def test_trainer_and_inference_get_shared_memory(compose: dict[str, Any]) -> None:
    for stage in ("trainer", "inference"):
        size = with_defaults(compose["services"][stage]["shm_size"])
        # Docker's own 64 MB end data loaders of torch and the workers of vLLM.
        assert re.fullmatch(r"[1-9]\d*g", size), f"{stage}: {size}"


def test_grafana_finds_its_dashboards_and_sources(compose: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    (provider,) = yaml.safe_load((provisioning / "dashboards/loraline.yml").read_text())["providers"]
    assert provider["folder"] == "Loraline"
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning", "where Grafana looks"
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert [source["name"] for source in sources if source.get("isDefault")] == ["Prometheus"]
    for source in sources:
        host, _, port = source["url"].removeprefix("http://").partition(":")
        listens = {with_defaults(entry).rpartition(":")[2] for entry in compose["services"][host]["ports"]}
        assert port in listens, f"{source['name']}: {host} does not listen on {port}"


@pytest.mark.parametrize("stage", STAGES)
def test_containers_get_longer_to_stop_than_a_checkpoint(compose: dict[str, Any], stage: str) -> None:
    service = compose["services"][stage]
    seconds = int(with_defaults(service["environment"]["LORALINE_STOP_GRACE_SECONDS"]))
    grace = with_defaults(service["stop_grace_period"])
    # The server allows itself five seconds for jobs and calls, and five for the rest.
    assert int(grace.removesuffix("s")) >= seconds + 15


def test_the_handbook_lists_versions_by_what_the_images_have() -> None:
    """The images have no `loraline` command."""
    page = (ROOT / "docs/operate.md").read_text()
    (stage, code), *more = re.findall(r"^    docker compose exec -T (\S+) python -c (\".*\")$", page, re.MULTILINE)
    assert stage in STAGES and not more
    done = subprocess.run(["bash", "-c", f'"$0" -c {code}', sys.executable], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {f"{name} {version(name)}" for name in ("grpcio", "loraline-core")} <= set(done.stdout.splitlines())


def test_gpus_come_by_the_second_file_to_trainer_and_inference() -> None:
    gpu = yaml.safe_load((ROOT / "deploy/compose/gpu.yml").read_text())["services"]
    assert set(gpu) == {"trainer", "inference"}
    for name, service in gpu.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert device["device_ids"] == [f"${{LORALINE_{name.upper()}_GPU:-0}}"]


def test_the_example_of_settings_names_every_variable_with_its_default() -> None:
    used: dict[str, str] = {}
    for file in FILES:
        for name, default in VARIABLE.findall((ROOT / file).read_text()):
            assert used.setdefault(name, default) == default, f"{name} has two defaults"
        assert not re.search(r"\$\{[A-Z0-9_]+\}", (ROOT / file).read_text()), f"{file}: a variable without a default"
    example = (ROOT / ".env.example").read_text()
    told = dict(re.findall(r"^#?([A-Z0-9_]+)=(.*)$", example, re.MULTILINE))
    assert {name: told.get(name) for name in used} == used
    assert set(told) - set(used) == {"COMPOSE_FILE"}, "settings that nothing reads"
    assert example.count("CHANGEME") >= 4


def test_a_collector_named_in_the_settings_switches_traces_on(compose: dict[str, Any]) -> None:
    given = [compose["services"][stage]["environment"] for stage in STAGES]
    settings = [{name: value for name, value in one.items() if name.startswith("OTEL_")} for one in given]
    assert settings[0]
    assert all(one == settings[0] for one in settings), "one trace goes through all four stages"
    defaults = {name: with_defaults(value) for name, value in settings[0].items()}
    assert settings[0] == {name: f"${{{name}:-{default}}}" for name, default in defaults.items()}
    program = "from loraline.core import tracing; tracing.configure('stage'); print(tracing.on())"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | defaults
    assert clean["OTEL_EXPORTER_OTLP_ENDPOINT"] == ""
    for endpoint, on in (("", "False"), ("http://127.0.0.1:9", "True")):
        command = [sys.executable, "-W", "error", "-c", program]
        environment = clean | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (ran.stdout.split(), ran.stderr) == ([on], ""), "OpenTelemetry does not understand the defaults"


@pytest.mark.parametrize("stage", STAGES)
def test_images_run_as_nobody_in_particular(stage: str) -> None:
    lines = (ROOT / "services" / stage / "Dockerfile").read_text().splitlines()
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001" in final
    tools = re.compile(r"\b(gcc|g\+\+|clang|make|cmake|build-essential|cargo|rustc|git|pip|uv)\b")
    runs = [line for line in final if line.startswith(("RUN", " ")) and not line.startswith("RUN rm -rf ")]
    builders = [line for line in runs if tools.search(line)]
    assert all("gpu" in line and "gcc" in line for line in builders), "compilers belong to the build stage"


@pytest.mark.parametrize("stage", STAGES)
def test_images_keep_no_installer(stage: str, tmp_path: Path) -> None:
    """The base image's pip, setuptools and wheel stand in no bill of materials."""
    text = (ROOT / "services" / stage / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    (command,) = re.findall(r"^RUN (rm -rf /usr/local/.*)$", text, re.MULTILINE)
    lib, programs = tmp_path / "lib/python3.11", tmp_path / "bin"
    gone = [lib / "site-packages/pip", lib / "site-packages/setuptools-79.0.1.dist-info", lib / "ensurepip"]
    gone += [programs / name for name in ("pip", "pip3", "pip3.11", "wheel")]
    kept = [lib / "json", lib / "site-packages", programs / "python3.11", tmp_path / "share"]
    for folder in (*gone, *kept):
        folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sh", "-euc", command.replace("/usr/local", str(tmp_path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in kept)


def test_secrets_are_made_once_and_the_key_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("make_secrets", ROOT / "deploy/compose/make_secrets.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "secrets")
    monkeypatch.setenv("LLM_API_KEY", "sk-of-the-provider")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert module.main() == 0
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "secrets" / "api_key").stat().st_mode & 0o777 == 0o600
    first = {p.name: p.read_text() for p in (tmp_path / "secrets").iterdir()}
    assert (first["llm_api_key"], first["hf_token"]) == ("sk-of-the-provider", "")
    assert module.main() == 0
    assert {p.name: p.read_text() for p in (tmp_path / "secrets").iterdir()} == first
    declared = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"]
    wanted = {Path(secret["file"]).name for secret in declared.values()}
    assert wanted <= set(first)
    passwords = [first[name] for name in ("postgres_password", "minio_secret_key", "grafana_password")]
    assert len(set(passwords)) == 3
    assert min(map(len, passwords)) >= 32
    principal = KeyRing(tmp_path / "secrets" / "api_keys.json").verify(first["api_key"].strip())
    assert principal
    assert principal.roles == ("operate",)
    assert first["api_key"].strip().split("_")[-1] not in first["api_keys.json"]
