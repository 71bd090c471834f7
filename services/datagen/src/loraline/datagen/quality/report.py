"""The report of a check: report.json for programs, report.html for people, which needs nothing from outside."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from loraline.datagen.quality.checks import TRAIN, VALIDATION, DatasetCheck

REPORT_VERSION = 1
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "article{border-left:.4rem solid #888;padding:.1rem 1rem;margin:1rem 0;background:#f7f7f7}"
    ".error{border-color:#b3261e}.warning{border-color:#b26a00}.info{border-color:#33691e}code{overflow-wrap:anywhere}"
)


def write_report(folder: Path, dataset: str, check: DatasetCheck, passed: bool) -> None:
    """Write both files."""
    report: dict[str, Any] = {
        "version": REPORT_VERSION,
        "dataset": dataset,
        "passed": passed,
        "rows": {"train": check.rows[TRAIN], "validation": check.rows[VALIDATION]},
        "findings": [finding.to_json() for finding in check.findings()],
    }
    text = json.dumps(report, ensure_ascii=False, indent=2)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(_page(report), encoding="utf-8", newline="\n")


def _page(report: dict[str, Any]) -> str:
    escape = html.escape
    rows, verdict = report["rows"], "passes" if report["passed"] else "does not pass"
    findings = "".join(_article(finding) for finding in report["findings"]) or "<p>Nothing was found.</p>"
    title = escape(f"Check of {report['dataset']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{rows['train']} rows for training, {rows['validation']} for validation. The dataset "
        f"<strong>{verdict}</strong> the gate.</p>{findings}</html>\n"
    )


def _article(finding: dict[str, Any]) -> str:
    escape = html.escape
    places = f"<p>Rows: <code>{escape(', '.join(finding['rows']))}</code></p>" if finding["rows"] else ""
    return (
        f'<article class="{finding["severity"]}"><h2>{escape(finding["code"])}</h2><p>{escape(finding["message"])}</p>'
        f"<p>{escape(finding['why'])} <strong>{escape(finding['remedy'])}</strong></p>{places}</article>"
    )
