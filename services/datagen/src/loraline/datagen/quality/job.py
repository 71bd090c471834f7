"""The check job: a dataset in, a report out, and a fixed version when asked for."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import failed_precondition
from loraline.core.jobs.context import JobContext
from loraline.datagen.job import publish_folder
from loraline.datagen.quality.checks import DatasetCheck, check_folder
from loraline.datagen.quality.fix import fix_folder
from loraline.datagen.quality.report import write_report
from loraline.datagen.quality.request import gate_of, settings_of
from loraline.datagen.quality.seen import TRAIN, VALIDATION
from loraline.datagen.quality.settings import CheckSettings


def check_dataset(context: JobContext, request: datagen_pb2.CheckDatasetRequest) -> datagen_pb2.CheckResult:
    """Check a dataset, publish the report, and publish a fixed version when asked for and anything could be fixed."""
    gate = gate_of(request.gate)
    source = context.fetch(request.dataset)
    if not (source / TRAIN).is_file():
        raise failed_precondition(
            "DATASET_WITHOUT_TRAIN_FILE", f"{format_ref(request.dataset)} has no {TRAIN}. Convert its files first, "
            "with ConvertDataset.", dataset=format_ref(request.dataset),
        )  # fmt: skip
    settings = settings_of(request.gate, context.library)
    check = _check(context, source, settings)
    result = datagen_pb2.CheckResult(
        findings=[finding.to_proto() for finding in check.findings], passed=not gate.refused(check.findings)
    )
    result.report.CopyFrom(_publish_report(context, request, source, check, result.passed))
    if request.fix:
        context.progress(fraction=0.7, message="Fixing rows", unit="row")
        fixed = _publish_fixed(context, request, source, settings)
        if fixed is not None:
            result.fixed.CopyFrom(fixed)
    context.progress(fraction=1.0, message="Checked", unit="row")
    return result


def _check(context: JobContext, source: Path, settings: CheckSettings) -> DatasetCheck:
    """Check every row; progress tells the share of the files' lines that were read."""
    lines = sum(_line_count(source / name) for name in (TRAIN, VALIDATION))

    def tell(rows: int) -> None:
        context.check_stop()
        context.progress(fraction=min(0.6, 0.6 * rows / max(lines, 1)), message=f"{rows} rows checked", unit="row")

    tell(0)
    return check_folder(source, settings, context.workdir, tell)


def _line_count(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _publish_report(
    context: JobContext, request: datagen_pb2.CheckDatasetRequest, source: Path, check: DatasetCheck, passed: bool
) -> artifact_pb2.ArtifactRef:
    folder = _new_folder(context.workdir / "report")
    dataset = format_ref(request.dataset)
    write_report(folder, dataset, source, check, passed)
    counts = {"train_rows": check.rows[TRAIN], "validation_rows": check.rows[VALIDATION], "passed": passed}
    artifact = publish_folder(
        context, request.dataset.name, folder, [request.dataset], {"dataset": dataset}, counts,
        artifact_pb2.ARTIFACT_KIND_REPORT,
    )  # fmt: skip
    return artifact.ref


def _publish_fixed(
    context: JobContext, request: datagen_pb2.CheckDatasetRequest, source: Path, settings: CheckSettings
) -> artifact_pb2.ArtifactRef | None:
    folder = context.workdir / "fixed"
    shutil.rmtree(folder, ignore_errors=True)
    done = fix_folder(source, folder, context.workdir)
    if not done:
        return None
    check = check_folder(folder, settings, context.workdir, lambda _: context.check_stop())
    if not check.rows[TRAIN]:
        context.note("Nothing would be left of train.jsonl; no fixed version was published.", severity="warning",
                     reason="FIX_LEAVES_NOTHING")  # fmt: skip
        return None
    _write_card(folder, format_ref(request.dataset), done, check)
    write_report(
        folder, f"{request.dataset.name}, fixed", folder, check, not gate_of(request.gate).refused(check.findings)
    )
    told = ", ".join(f"{count} {code}" for code, count in sorted(done.items()))
    context.note(f"Fixed: {told}.", reason="DATASET_FIXED")
    facts = {"rows": check.rows.total(), "train_rows": check.rows[TRAIN], "validation_rows": check.rows[VALIDATION]}
    applied = {"fixed_from": format_ref(request.dataset), "fixes": dict(done)}
    return publish_folder(context, request.dataset.name, folder, [request.dataset], applied, facts).ref


def _write_card(folder: Path, dataset: str, done: Counter[str], check: DatasetCheck) -> None:
    """Say in the data card what was fixed; the rest of a card that came with the dataset stays."""
    path = folder / "data_card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        card = {}
    card = card if isinstance(card, dict) else {}
    rows = {"train": check.rows[TRAIN], "validation": check.rows[VALIDATION]}
    before = card.get("rows")
    card["rows"] = {**before, **rows} if isinstance(before, dict) else rows
    card["findings"] = [finding.to_json() for finding in check.findings]
    card["fixed_from"], card["fixes"] = dataset, dict(sorted(done.items()))
    path.write_text(json.dumps(card, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else "# Dataset\n"
    fixes = "".join(f"- {count} rows: {code}\n" for code, count in sorted(done.items()))
    told = f"\n## Fixed\n\nMade from {dataset}; the counts above are those before the fixes. Now {rows['train']} rows "
    readme.write_text(f"{text}{told}for training and {rows['validation']} for validation.\n\n{fixes}", encoding="utf-8")


def _new_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
