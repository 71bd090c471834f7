"""The evidence of a merge as files: merge_report.json for programs, README.md (the model card) for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.merger.v1 import merger_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.merger.base import BaseFolder
from loraline.merger.check.findings import Finding
from loraline.merger.engines.measure import Measurement
from loraline.merger.exporting import ExportOutcome
from loraline.merger.exports.licence import find_licence
from loraline.merger.merging import MergeOptions, MergeOutcome
from loraline.merger.spec import ExportSpec
from loraline.merger.sync import write_json

REPORT_FILE = "merge_report.json"
_MERGE_BASES = {
    "original": merger_pb2.MERGE_BASE_ORIGINAL,
    "dequantized": merger_pb2.MERGE_BASE_DEQUANTIZED,
}
_LIBRARIES = (
    "bitsandbytes",
    "compressed-tensors",
    "gguf",
    "loraline-merger",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)

Adapters = Sequence[tuple[ArtifactRef, float]]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make a merge, by distribution name; missing ones are left out."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def merge_result(outcome: MergeOutcome) -> merger_pb2.MergeResult:
    """Return the outcome as the contract has it; the model's reference is filled in after publishing."""
    return merger_pb2.MergeResult(
        measurements=measurement_protos(outcome.measurements),
        synced_files=[file.to_proto() for file in outcome.synced],
        repairs=[repair.to_proto() for repair in outcome.repairs],
        merged_tensors=outcome.written.merged_tensors,
        bytes_written=outcome.written.bytes_written,
        receipt_rows_matched=outcome.receipt_rows,
        merge_path=outcome.merge_path,
        merge_base=_MERGE_BASES[outcome.merge_base],
        merge_seconds=outcome.merge_seconds,
        measure_seconds=outcome.measure_seconds,
        merge_peak_bytes=outcome.peak_bytes,
    )


def write_reports(
    folder: Path, name: str, outcome: MergeOutcome, options: MergeOptions, base: BaseFolder, adapters: Adapters
) -> None:
    """Write both files into the model's folder. No times, so that an equal merge gives an equal artifact."""
    write_json(folder / REPORT_FILE, _report(outcome, options, base, adapters))
    (folder / "README.md").write_text(_card(name, outcome, options, base, adapters), encoding="utf-8")


def _report(outcome: MergeOutcome, options: MergeOptions, base: BaseFolder, adapters: Adapters) -> dict[str, Any]:
    return {
        "version": 1,
        "base_model": {"name": base.source.label, "digest": base.digest},
        "adapters": [{"ref": format_ref(ref), "digest": ref.digest, "weight": weight} for ref, weight in adapters],
        "merge_path": outcome.merge_path,
        "merge_base": outcome.merge_base,
        "dtype": outcome.dtype,
        "merged_tensors": outcome.written.merged_tensors,
        "bytes_written": outcome.written.bytes_written,
        "measurements": [{**asdict(found), "within_bound": within} for found, within in outcome.measurements],
        "bounds": {
            "max_kl": options.bounds.max_kl,
            "max_abs_logprob_diff": options.bounds.max_diff_for(outcome.dtype),
        },
        "receipt_rows_matched": outcome.receipt_rows,
        "synced_files": [asdict(file) for file in outcome.synced],
        "repairs": [asdict(repair) for repair in outcome.repairs],
        "remarks": outcome.remarks,
        "library_versions": library_versions(),
    }


def _card(name: str, outcome: MergeOutcome, options: MergeOptions, base: BaseFolder, adapters: Adapters) -> str:
    licence = find_licence(base.folder)
    lines = [
        *licence.front_matter(base.source.hub_id),
        f"# {name}",
        "",
        "A merged model, measured against its base with the adapter attached.",
        "",
        "## Lineage",
        "",
    ]
    lines += ["| what | name | digest | weight |", "| --- | --- | --- | --- |"]
    lines.append(f"| base | {base.source.label} | {base.digest or 'not an artifact'} | |")
    lines += [f"| adapter | {format_ref(ref)} | {ref.digest} | {weight:g} |" for ref, weight in adapters]
    lines += ["", f"Merge path: {outcome.merge_path}. Weights: {outcome.dtype}, "]
    lines[-1] += f"{outcome.written.merged_tensors} tensors merged."
    lines += ["", "## Evidence", "", "Differences in nats; the reference is base+adapter, unmerged.", ""]
    lines += evidence_table(outcome.measurements)
    limit = options.bounds.max_diff_for(outcome.dtype)
    lines += ["", f"Bounds: difference {limit:g}, mean KL {options.bounds.max_kl:g}. "]
    lines[-1] += f"Token receipt: {outcome.receipt_rows} rows rendered to the ids of the training."
    lines += ["", "## Files beside the base's", "", "| file | same bytes | difference |", "| --- | --- | --- |"]
    lines += [f"| {f.path} | {'yes' if not f.difference else 'no'} | {_cell(f.difference)} |" for f in outcome.synced]
    lines += licence.section("base")
    if outcome.remarks:
        lines += ["", "## Remarks", "", *(f"- {remark}" for remark in outcome.remarks)]
    return "\n".join(lines) + "\n"


def evidence_table(measurements: Sequence[tuple[Measurement, bool]]) -> list[str]:
    """Return the lines of a Markdown table of measurements."""
    return [
        "| compared | tokens | mean KL | max KL | max difference | top-1 equal | base to adapter | within bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(found, within) for found, within in measurements),
    ]


def measurement_protos(measurements: Sequence[tuple[Measurement, bool]]) -> list[merger_pb2.MergeMeasurement]:
    """Return measurements as the contract has them."""
    return [merger_pb2.MergeMeasurement(**{**asdict(found), "within_bound": within}) for found, within in measurements]


def _row(found: Any, within: bool) -> str:
    verdict = "yes" if within else "no"
    if found.mean_kl == found.top1_agreement == 0:  # recorded log-probabilities have no distribution to compare
        kl = "| – | –"
        return f"| {found.subject} | {found.tokens} {kl} | {found.max_abs_logprob_diff:.2e} | – | | {verdict} |"
    top1, moved = f"{found.top1_agreement:.3f}", f"{found.base_to_adapter_diff:.2e}"
    return (
        f"| {found.subject} | {found.tokens} | {found.mean_kl:.2e} | {found.max_kl:.2e} | "
        f"{found.max_abs_logprob_diff:.2e} | {top1} | {moved} | {verdict} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_check_report(folder: Path, model: str, findings: Sequence[Finding], *, loads: bool) -> None:
    """Write a check's report, for programs and for people."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"version": 1, "model": model, "loadable": loads, "findings": [asdict(f) for f in findings]}
    write_json(folder / "report.json", content)
    lines = [f"# Check of {model}", "", "It will load." if loads else "It will **not** load.", ""]
    if findings:
        lines += [
            "| severity | code | file | what | what to do | repairable |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {f.severity} | {f.code} | {f.file} | {_cell(f.message)} | {_cell(f.remedy)} | "
            f"{'yes' if f.repairable else 'no'} |"
            for f in findings
        ]
    else:
        lines.append("Nothing was found.")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_export_report(
    folder: Path, spec: ExportSpec, outcome: ExportOutcome, source: Path, model: ArtifactRef
) -> None:
    """Write an export's report and card: lineage back to base and adapters, evidence of both steps, licence."""
    merge = json.loads((source / REPORT_FILE).read_bytes()) if (source / REPORT_FILE).is_file() else {}
    lineage = [("model", format_ref(model), model.digest)]
    lineage += [("adapter", one["ref"], one["digest"]) for one in merge.get("adapters", ())]
    base = merge.get("base_model")
    lineage += [("base", base["name"], base["digest"] or "not an artifact")] if base else []
    content = {
        "version": 1, "format": outcome.format, "model": {"ref": format_ref(model), "digest": model.digest},
        "bytes_written": outcome.size, "greatest_weight_error": outcome.greatest_error, "notes": outcome.notes,
        "measurements": [{**asdict(found), "within_bound": within} for found, within in outcome.measurements],
        "merge": merge, "library_versions": library_versions(),
    }  # fmt: skip
    write_json(folder / "export_report.json", content)
    licence = find_licence(source)
    lines = [
        *licence.front_matter(),
        f"# {spec.name}",
        "",
        f"{format_ref(model)} as {outcome.format}.",
        "",
        "## Lineage",
        "",
    ]
    lines += ["| what | name | digest |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in lineage)]
    lines += ["", "## Evidence", "", "Differences in nats; the reference is the model above.", ""]
    lines += evidence_table(outcome.measurements)
    lines += ["", f"Bounds: difference {spec.bounds.max_diff:g}, mean KL {spec.bounds.max_kl:g}."]
    lines += [f"- {note}" for note in outcome.notes]
    if merge.get("measurements"):
        rows = [(Measurement(**{k: v for k, v in row.items() if k != "within_bound"}), row["within_bound"])
                for row in merge["measurements"]]  # fmt: skip
        lines += ["", "The merge before it, against base+adapter:", "", *evidence_table(rows)]
    (folder / "README.md").write_text("\n".join([*lines, *licence.section("model")]) + "\n", encoding="utf-8")
