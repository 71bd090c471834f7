"""The jobs that look at finished model folders: check and repair. They run in the job's own process."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.merger.v1 import merger_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.receipt import FILE_NAME as RECEIPT_FILE
from loraline.core.evidence.receipt import load_receipt
from loraline.core.jobs.context import JobContext
from loraline.core.server_paths import model_folder
from loraline.merger.check.findings import Finding, from_error, gravest_first, loadable
from loraline.merger.check.folder import check_folder
from loraline.merger.check.tokens import chat_template
from loraline.merger.repair import repair_folder
from loraline.merger.sync import files_to_sync
from loraline.merger.weights.layout import PICKLE_SUFFIXES, unsafe_path


def run_check(context: JobContext, request: merger_pb2.CheckModelRequest) -> merger_pb2.CheckModelResult:
    """Check a model and publish the report."""
    with context.loading():
        from loraline.merger.engines import rendering, skeleton  # noqa: F401 (slow; used below)
        from loraline.merger.report import library_versions, write_check_report

    folder, ref, label = _locate(context, request.model, "model.path")
    base = _locate(context, request.base_model, "base_model.path")[0] if request.HasField("base_model") else None
    if base is not None:
        files_to_sync(base)  # the report quotes its config: a link out of the folder would show what it leads to
    context.check_stop()
    context.progress(fraction=0.1, message="reading headers")
    findings = check_unlinked(folder, base)
    for finding in findings:
        context.count("findings", code=finding.code, severity=finding.severity)
    context.check_stop()
    loads = loadable(findings)
    report = context.workdir / "report"
    write_check_report(report, label, findings, loads=loads)
    artifact = context.publish(
        artifact_pb2.ARTIFACT_KIND_REPORT,
        report_name(ref.name if ref is not None else folder.name),
        report,
        inputs=[ref] if ref is not None else [],
        facts={"model": label, "findings": len(findings), "loadable": loads},
        library_versions=library_versions(),
    )
    protos = [finding.to_proto() for finding in findings]
    return merger_pb2.CheckModelResult(findings=protos, loadable=loads, report=artifact.ref)


def run_repair(context: JobContext, request: merger_pb2.RepairModelRequest) -> merger_pb2.RepairModelResult:
    """Repair a copy of a model and publish it as a new version."""
    with context.loading():
        from loraline.merger.engines import rendering, skeleton  # noqa: F401 (slow; used below)
        from loraline.merger.report import library_versions, write_check_report

    folder, ref, label = _locate(context, request.model, "model.path")
    base, base_ref = None, None
    if request.HasField("base_model"):
        base, base_ref, _ = _locate(context, request.base_model, "base_model.path")
        files_to_sync(base)  # its files are copied: a link out of the folder would publish what it leads to
    copy = context.workdir / "model"
    shutil.rmtree(copy, ignore_errors=True)
    context.progress(fraction=0.1, message="copying")
    copy_model(folder, copy)
    repaired = repair_folder(copy, base)
    for finding in repaired:
        context.count("repairs", code=finding.code)
    remaining = check_everything(copy, base)
    context.check_stop()
    if not repaired:
        raise failed_precondition(
            "NOTHING_TO_REPAIR",
            f"{label} has {len(remaining)} findings and none that can be repaired safely. CheckModel lists them.",
        )
    write_check_report(copy / "repair", f"{request.name}, repaired from {label}", remaining, loads=loadable(remaining))
    artifact = context.publish(
        artifact_pb2.ARTIFACT_KIND_MODEL,
        request.name,
        copy,
        inputs=[one for one in (ref, base_ref) if one is not None],
        settings=MessageToDict(request, preserving_proto_field_name=True),
        facts={"repaired_from": label, "repairs": len(repaired), "loadable": loadable(remaining)},
        library_versions=library_versions(),
    )
    shutil.rmtree(copy, ignore_errors=True)
    return merger_pb2.RepairModelResult(
        model=artifact.ref,
        repaired=[finding.to_proto() for finding in repaired],
        remaining=[finding.to_proto() for finding in remaining],
    )


def _locate(
    context: JobContext, location: merger_pb2.ModelLocation, field: str
) -> tuple[Path, ArtifactRef | None, str]:
    if location.WhichOneof("location") == "artifact":
        ref = context.library.resolve(location.artifact)
        return context.fetch(ref), ref, format_ref(ref)
    folder = model_folder(location.path, context.settings.allowed_paths, field)
    return folder, None, folder.name


def check_unlinked(folder: Path, base: Path | None) -> list[Finding]:
    """Check a stranger's folder; where config or tokenizer are links out of it, that is all that is told."""
    try:
        files_to_sync(folder)
    except LoralineError as error:
        return [from_error(error, error.metadata.get("file", "config.json"))]
    return check_everything(folder, base)


def check_everything(folder: Path, base: Path | None) -> list[Finding]:
    """Return what files, headers, transformers' own model and a rendering say, gravest first."""
    from loraline.merger.engines.skeleton import check_loading

    found = check_folder(folder, base)
    if loadable(found):  # else the same cause would be told twice
        found += check_loading(folder)
    return gravest_first(dict.fromkeys([*found, *check_rendering(folder)]))


def check_rendering(folder: Path) -> list[Finding]:
    """Load the tokenizer as a server would, and render with it: the token receipt, else a plain conversation."""
    from loraline.merger.engines.rendering import load_tokenizer, receipt_mismatches, replaced_tokenizer, sample_problem

    try:
        tokenizer = load_tokenizer(folder)
        found = replaced_tokenizer(folder, tokenizer)
        if not (folder / RECEIPT_FILE).exists():
            return [*found, *sample_problem(tokenizer, chat_template(folder))]
        mismatches = receipt_mismatches(folder, load_receipt(folder))
    except LoralineError as error:
        return [from_error(error, "tokenizer_config.json")]
    if not mismatches:
        return found
    message = f"Conversations of the training render to other ids: {mismatches[0]} ({len(mismatches)} rows)."
    remedy = "Take tokenizer and chat template from the training."
    return [*found, Finding("RECEIPT_MISMATCH", "error", RECEIPT_FILE, message, remedy)]


def copy_model(source: Path, target: Path) -> None:
    """Copy a model's files, without pickles, code and hidden files; weights, which no repair writes, as hard links."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(source.resolve()):
            raise unsafe_path(relative.as_posix(), f"it is a link to {path.resolve()}")
        if path.suffix in {*PICKLE_SUFFIXES, ".py"}:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), target / relative)
                continue
            except OSError:  # another file system, or links not permitted
                pass
        shutil.copyfile(path, target / relative)


def report_name(model: str) -> str:
    """Return the name of a model's check report: `check-` and as much of the model's name as fits."""
    cleaned = re.sub(r"[^a-z0-9._-]+", "-", model.lower())
    return f"check-{cleaned}"[:64]
