"""The merge job: fetches base and adapters, merges, publishes model and evidence. Runs in the job's own process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, resource_exhausted
from loraline.core.jobs.context import JobContext
from loraline.merger.adapter import open_adapter, trained_quantised
from loraline.merger.base import BaseFolder, BaseSource, bring_base, recorded_base
from loraline.merger.config import MergerSettings
from loraline.merger.spec import MergeSpec, merge_spec

if TYPE_CHECKING:
    from loraline.merger.merging import MergeOutcome

_MERGE_SHARE = 0.7
"""Part of a merge job's progress that is told by bytes written; the rest is proving and publishing."""


def run(context: JobContext, request: merger_pb2.MergeRequest) -> merger_pb2.MergeResult:
    """Do a merge job and return its result. Everything that is wrong is a LoralineError; then nothing is published."""
    try:
        return _merge(context, merge_spec(request), MessageToDict(request, preserving_proto_field_name=True))
    except LoralineError as error:
        context.count("refused", reason=error.reason)
        raise
    except MemoryError as error:
        raise resource_exhausted(
            "OUT_OF_MEMORY",
            "The models did not fit into memory while they were measured. Set LORALINE_MERGER_MEASURE_DTYPE=auto, "
            "or use a larger machine; merging itself needs little.",
        ) from error


def _merge(context: JobContext, spec: MergeSpec, settings: Mapping[str, Any]) -> merger_pb2.MergeResult:
    with context.loading():
        from loraline.merger.merging import AdapterInput, MergeOptions, merge_folders
        from loraline.merger.report import library_versions, merge_result, write_reports

    refs = [(context.library.resolve(ref), weight) for ref, weight in spec.adapters]
    inputs = [
        AdapterInput(context.fetch(ref), weight, format_ref(ref), trained_quantised(context.library.get(ref)))
        for ref, weight in refs
    ]
    base = _bring_base(context, spec, inputs[0].folder)
    context.check_stop()
    own = MergerSettings()
    options = MergeOptions(
        spec.dtype, spec.bounds, spec.merge_base, base.digest, own.measure(), spec.combine, spec.density
    )
    out = context.workdir / "model"
    outcome = merge_folders(base.folder, inputs, out, options, _watch(context))
    _tell(context, outcome)
    write_reports(out, spec.name, outcome, options, base, refs)
    context.check_stop()
    context.progress(fraction=0.95, message="publishing", unit="byte")
    lineage = [ref for ref, _ in refs] + ([base.source.artifact] if base.source.artifact is not None else [])
    result = merge_result(outcome)
    artifact = context.publish(
        artifact_pb2.ARTIFACT_KIND_MODEL,
        spec.name,
        out,
        inputs=lineage,
        settings=settings,
        facts=_facts(result, base, outcome.dtype),
        library_versions=library_versions(),
    )
    result.model.CopyFrom(artifact.ref)
    context.progress(fraction=1.0, message="done", unit="byte")
    shutil.rmtree(out, ignore_errors=True)
    return result


def _tell(context: JobContext, outcome: MergeOutcome) -> None:
    for remark in outcome.remarks:
        context.note(remark, severity="warning", reason="MERGE_REMARK")
    for repair in outcome.repairs:
        context.note(f"{repair.file}: {repair.message} {repair.remedy}", severity="info", reason=repair.code)
    for shard in outcome.written.resumed_shards:
        context.note(f"{shard} was kept from an earlier attempt", reason="SHARD_RESUMED", file=shard)
    context.count("merge_seconds", outcome.merge_seconds, part="write")
    context.count("merge_seconds", outcome.measure_seconds, part="measure")
    context.count("merge_written", outcome.written.bytes_written, kind="merge")
    for repair in outcome.repairs:
        context.count("repairs", code=repair.code)


def _bring_base(context: JobContext, spec: MergeSpec, first_adapter: Any) -> BaseFolder:
    if spec.base is not None:
        source = BaseSource(artifact=context.library.resolve(spec.base))
    else:
        source = recorded_base(open_adapter(first_adapter), format_ref(spec.adapters[0][0]))
        if source.artifact is not None:
            source = BaseSource(artifact=context.library.resolve(source.artifact))
    return bring_base(source, fetch=context.fetch, allowed=context.settings.allowed_paths, workdir=context.workdir)


def _watch(context: JobContext) -> Any:
    from loraline.merger.merging import MergeWatch

    begin = time.monotonic()

    def bytes_done(done: int, total: int) -> None:
        speed = done / max(1e-6, time.monotonic() - begin)
        context.gauge("merge_speed", speed)
        context.progress(
            step=done,
            total_steps=total,
            fraction=_MERGE_SHARE * done / max(1, total),
            message="merging",
            unit="byte",
            metrics={"bytes_per_second": speed},
        )

    def stage(message: str) -> None:
        context.note(message, reason="MERGE_STAGE")
        if not message.startswith("merging"):
            context.progress(fraction=_MERGE_SHARE, message=message, unit="byte")

    return MergeWatch(check=context.check_stop, bytes_done=bytes_done, stage=stage)


def _facts(result: merger_pb2.MergeResult, base: BaseFolder, dtype: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "base_model": base.source.label,
        "dtype": dtype,
        "merged_tensors": result.merged_tensors,
        "merge_path": result.merge_path,
        "repairs": len(result.repairs),
    }
    if result.measurements:
        last = result.measurements[-1]
        facts |= {"mean_kl": last.mean_kl, "max_abs_logprob_diff": last.max_abs_logprob_diff}
    return facts
