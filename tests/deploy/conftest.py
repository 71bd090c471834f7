"""Renders the Kubernetes overlays once with the real kustomize, for all tests of what comes out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.sdk import environment_variables
from pydantic_settings import BaseSettings

from loraline.core.config import CoreSettings
from loraline.datagen.config import DatagenSettings
from loraline.inference.config import InferenceSettings
from loraline.merger.config import MergerSettings
from loraline.trainer.config import TrainerSettings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # operator_schemas.py stands beside the tests
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))


OWN = {
    "datagen": DatagenSettings,
    "trainer": TrainerSettings,
    "merger": MergerSettings,
    "inference": InferenceSettings,
}
OTEL = {name for name in vars(environment_variables).values() if isinstance(name, str) and name.startswith("OTEL_")}
HUB = {"HF_ENDPOINT", "HF_HOME", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"}
LLM = {"LLM_BASE_URL", "LLM_MODEL", "LLM_API_KEY_FILE"}


@pytest.fixture(scope="session")
def unread() -> Callable[[str, Iterable[str]], set[str]]:
    """Return what tells which variables of a stage's environment nothing in it reads."""

    def of(settings: type[BaseSettings]) -> set[str]:
        prefix = settings.model_config.get("env_prefix", "")
        return {prefix + name.upper() for name in settings.model_fields}

    return lambda stage, given: set(given) - of(CoreSettings) - of(OWN[stage]) - OTEL - HUB - LLM


@dataclass
class Rendered:
    """The objects of one overlay."""

    name: str
    objects: list[dict[str, Any]]

    def kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the objects of a kind by name."""
        return {o["metadata"]["name"]: o for o in self.objects if o["kind"] == kind}

    def workloads(self) -> dict[str, dict[str, Any]]:
        """Return everything that makes pods, by name."""
        return {**self.kind("Deployment"), **self.kind("StatefulSet")}

    def pods(self) -> dict[str, dict[str, Any]]:
        """Return the pod templates by the names of their workloads."""
        return {name: workload["spec"]["template"] for name, workload in self.workloads().items()}

    def stages(self) -> dict[str, dict[str, Any]]:
        """Return the pod templates of the four stages."""
        return {n: p for n, p in self.pods().items() if "loraline.dev/stage" in p["metadata"]["labels"]}

    def environment(self, stage: str) -> dict[str, str]:
        """Return what the ConfigMaps put into the environment of a stage's container."""
        maps = self.kind("ConfigMap")
        (container,) = self.pods()[stage]["spec"]["containers"]
        found: dict[str, str] = {}
        for source in container["envFrom"]:
            found |= maps[source["configMapRef"]["name"]].get("data", {})
        return found


@pytest.fixture(scope="session")
def rendered() -> dict[str, Rendered]:
    """Return every overlay's objects by the overlay's name."""
    kubectl = Path(sys.executable).with_name("kubectl")
    found: dict[str, Rendered] = {}
    for name in OVERLAYS:
        command = [kubectl, "kustomize", KUBERNETES / "overlays" / name]
        made = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert made.returncode == 0, f"{name}: {made.stderr}"
        assert "deprecated" not in made.stderr, made.stderr
        found[name] = Rendered(name, [o for o in yaml.safe_load_all(made.stdout) if o])
    return found


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, rendered: dict[str, Rendered]) -> Rendered:
    """Return one overlay after the other."""
    return rendered[request.param]
