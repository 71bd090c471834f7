#!/usr/bin/env python3
"""Writes what the monitoring component takes over from deploy/prometheus/rules and deploy/grafana/dashboards.

The rules become a PrometheusRule, the dashboards a list of ConfigMaps. Run it after a change there; `--check` only
tells whether it is due.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
RULES = DEPLOY / "kubernetes/components/monitoring/rules.yaml"
DASHBOARDS = DEPLOY / "grafana/dashboards/kustomization.yaml"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, as people write PromQL."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(document: object) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def rules() -> str:
    """Return the PrometheusRule with the groups of all rule files, in the order of the files' names."""
    groups: list[object] = []
    for file in sorted((DEPLOY / "prometheus/rules").glob("*.yml")):
        groups += yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "loraline",
            "namespace": "loraline",
            "labels": {"release": "kube-prometheus-stack"},
        },
        "spec": {"groups": groups},
    }
    return "# Made from deploy/prometheus/rules by deploy/kubernetes/make_monitoring.py.\n" + _dump(document)


def dashboards() -> str:
    """Return the kustomization that makes a ConfigMap of each dashboard; Grafana's sidecar looks for its label."""
    files = sorted(path.name for path in DASHBOARDS.parent.glob("*.json"))
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "loraline",
        "generatorOptions": {
            "disableNameSuffixHash": True,
            "labels": {"grafana_dashboard": "1"},
            "annotations": {"grafana_folder": "Loraline"},
        },
        "configMapGenerator": [
            {"name": f"dashboard-{Path(name).stem.replace('_', '-').lower()}", "files": [name]} for name in files
        ],
    }
    return "# Made by deploy/kubernetes/make_monitoring.py, for deploy/kubernetes alone.\n" + _dump(document)


def main() -> int:
    """Write the files, or tell with `--check` which are stale."""
    made = {RULES: rules(), DASHBOARDS: dashboards()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(DEPLOY.parent)} is stale; run: python deploy/kubernetes/make_monitoring.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
        print(path.relative_to(DEPLOY.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
