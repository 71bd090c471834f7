"""The compose file's promises, read from the file, and the secrets it needs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraline.core.serving.auth import KeyRing

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("datagen", "trainer", "merger", "inference")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_locked_down(compose: dict[str, Any], stage: str) -> None:
    service = compose["services"][stage]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert {name: c["condition"] for name, c in service["depends_on"].items()} == {
        "postgres": "service_healthy",
        "minio": "service_healthy",
    }
    assert "mem_limit" in service


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published
    assert [port for port in published if not str(port).startswith("127.0.0.1:")] == []


def test_no_secret_stands_in_the_environment(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if any(word in key for word in ("PASSWORD", "SECRET", "API_KEY", "KEYS")):
                assert key.endswith("FILE"), f"{name}: {key}"
                assert str(value).startswith("/run/secrets/"), f"{name}: {key}"


def test_everything_has_a_health_check(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name in STAGES:
            assert "HEALTHCHECK" in (ROOT / "services" / name / "Dockerfile").read_text()
        else:
            assert "healthcheck" in service, name


@pytest.mark.parametrize("stage", STAGES)
def test_images_run_as_nobody_in_particular(stage: str) -> None:
    lines = (ROOT / "services" / stage / "Dockerfile").read_text().splitlines()
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001" in final
    tools = re.compile(r"\b(gcc|g\+\+|clang|make|cmake|build-essential|cargo|rustc|git|pip|uv)\b")
    builders = [line for line in final if line.startswith(("RUN", " ")) and tools.search(line)]
    assert all("gpu" in line and "gcc" in line for line in builders), "compilers belong to the build stage"


def test_secrets_are_made_once_and_the_key_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("make_secrets", ROOT / "deploy/compose/make_secrets.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "secrets")
    assert module.main() == 0
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "secrets" / "api_key").stat().st_mode & 0o777 == 0o600
    first = {p.name: p.read_text() for p in (tmp_path / "secrets").iterdir()}
    assert module.main() == 0
    assert {p.name: p.read_text() for p in (tmp_path / "secrets").iterdir()} == first
    declared = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"]
    wanted = {Path(secret["file"]).name for secret in declared.values()}
    assert wanted <= set(first)
    principal = KeyRing(tmp_path / "secrets" / "api_keys.json").verify(first["api_key"].strip())
    assert principal
    assert principal.roles == ("operate",)
    assert first["api_key"].strip().split("_")[-1] not in first["api_keys.json"]
