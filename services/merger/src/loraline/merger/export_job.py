"""The export job: fetches a model, writes it for another runtime, publishes it with its evidence. Runs in a child."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.merger.v1 import merger_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, resource_exhausted
from loraline.core.jobs.context import JobContext
from loraline.merger.config import MergerSettings
from loraline.merger.spec import ExportSpec, export_spec

if TYPE_CHECKING:
    from loraline.merger.exporting import ExportOutcome

_WRITE_SHARE = 0.6
"""Part of the progress that is told by bytes written; the rest is measuring and publishing."""


def run_export(context: JobContext, request: merger_pb2.ExportModelRequest) -> merger_pb2.ExportModelResult:
    """Do an export job. Everything that is wrong is a LoralineError; then nothing is published."""
    spec = export_spec(request)
    try:
        return _export(context, spec, context.library.resolve(request.model), request)
    except LoralineError as error:
        context.count("refused", reason=error.reason)
        raise
    except MemoryError as error:
        raise resource_exhausted(
            "OUT_OF_MEMORY", "The export did not fit into memory while it was measured. Use a larger machine."
        ) from error


def _export(
    context: JobContext, spec: ExportSpec, model: ArtifactRef, request: merger_pb2.ExportModelRequest
) -> merger_pb2.ExportModelResult:
    with context.loading():
        from loraline.merger.exporting import export_folder
        from loraline.merger.merging import MergeWatch
        from loraline.merger.report import library_versions, measurement_protos, write_export_report

    source = context.fetch(model)
    out = context.workdir / "export"

    def bytes_done(done: int, total: int) -> None:
        fraction = _WRITE_SHARE * done / max(1, total)
        context.progress(step=done, total_steps=total, fraction=fraction, message="writing", unit="byte")
        context.check_stop()

    watch = MergeWatch(context.check_stop, bytes_done, lambda text: context.note(text, reason="EXPORT_STAGE"))
    outcome = export_folder(source, out, spec, MergerSettings().measure(), watch)
    context.count("merge_written", outcome.size, kind="export")
    write_export_report(out, spec, outcome, source, model)
    context.check_stop()
    context.progress(fraction=0.95, message="publishing", unit="byte")
    artifact = context.publish(
        artifact_pb2.ARTIFACT_KIND_MODEL,
        spec.name,
        out,
        inputs=[model],
        settings=MessageToDict(request, preserving_proto_field_name=True),
        facts=_facts(outcome, model),
        library_versions=library_versions(),
    )
    shutil.rmtree(out, ignore_errors=True)
    return merger_pb2.ExportModelResult(
        export=artifact.ref,
        measurements=measurement_protos(outcome.measurements),
        bytes_written=outcome.size,
        greatest_weight_error=outcome.greatest_error,
        notes=outcome.notes,
    )


def _facts(outcome: ExportOutcome, model: ArtifactRef) -> dict[str, object]:
    found = outcome.measurements[-1][0]
    return {
        "export_format": outcome.format,
        "exported_from": format_ref(model),
        "mean_kl": found.mean_kl,
        "max_abs_logprob_diff": found.max_abs_logprob_diff,
    }
