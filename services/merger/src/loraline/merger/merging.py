"""The whole merge over local folders: plan, write, synchronise, repair, prove, measure. Publishes nothing itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.probes import FILE_NAME as PROBES_FILE
from loraline.core.evidence.receipt import FILE_NAME as RECEIPT_FILE
from loraline.core.evidence.receipt import load_receipt
from loraline.merger.adapter import check_base, open_adapter
from loraline.merger.check.findings import Finding
from loraline.merger.check.folder import check_folder
from loraline.merger.check.tokens import chat_template
from loraline.merger.engines.deltas import LoraRows, RowSource
from loraline.merger.engines.judgement import measure_merge
from loraline.merger.engines.measure import Measurement
from loraline.merger.engines.peft_merge import merge_with_peft
from loraline.merger.engines.rendering import receipt_mismatches
from loraline.merger.engines.streaming import StreamedMerge, write_merged
from loraline.merger.plan import MergePlan, make_plan, plan_fingerprint, stored_dtype
from loraline.merger.repair import adopt_template, adopt_training, repair_folder
from loraline.merger.spec import MeasureSettings, MergeBounds, quantised_training
from loraline.merger.sync import SyncedFile, compare_files, copy_base_files, write_dtype
from loraline.merger.vocabulary import adopt_tokenizer, write_untied, write_vocabulary
from loraline.merger.weights.header import Form
from loraline.merger.weights.layout import INDEX_FILE, WeightFiles, open_weights


@dataclass(frozen=True)
class AdapterInput:
    """An adapter's folder, its weight and what to call it in messages."""

    folder: Path
    weight: float = 1.0
    name: str = "the adapter"
    trained_quantised: bool = False
    """Training ran on a base in 8 or 4 bits."""


@dataclass(frozen=True)
class MergeOptions:
    """What the caller may choose."""

    dtype: str = ""
    bounds: MergeBounds = field(default_factory=MergeBounds)
    original_base: bool = False
    base_digest: str = ""
    """Digest of the base artifact; empty for a folder or a Hub model."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)


@dataclass(frozen=True)
class MergeWatch:
    """How the caller follows and stops a merge. `check` raises to stop."""

    check: Callable[[], None] = lambda: None
    bytes_done: Callable[[int, int], None] = lambda done, total: None
    stage: Callable[[str], None] = lambda message: None


@dataclass
class MergeOutcome:
    """Everything that a merge found out."""

    merge_path: str
    dtype: str
    written: StreamedMerge
    repairs: list[Finding] = field(default_factory=list)
    synced: list[SyncedFile] = field(default_factory=list)
    measurements: list[tuple[Measurement, bool]] = field(default_factory=list)
    receipt_rows: int = 0
    remarks: list[str] = field(default_factory=list)


def merge_folders(
    base: Path, inputs: Sequence[AdapterInput], out: Path, options: MergeOptions, watch: MergeWatch = MergeWatch()
) -> MergeOutcome:
    """Merge adapters into a base and write a complete model folder to `out`, or raise a typed error.

    `out` may hold finished shards of an interrupted attempt at the same merge; they are kept. Its parent folder takes
    working files. Nothing of the inputs is written to.
    """
    weights = open_weights(base)
    adapters = [open_adapter(one.folder) for one in inputs]
    remarks: list[str] = []
    for adapter, one in zip(adapters, inputs, strict=True):
        remarks += check_base(adapter, name=one.name, base=base, base_digest=options.base_digest)
        remarks += _quantised_training(one, original=options.original_base)
    pairs = [(adapter, one.weight) for adapter, one in zip(adapters, inputs, strict=True)]
    plan = make_plan(weights, pairs, options.dtype)
    watch.stage(f"merging ({plan.merge_path})")
    written, form = _write(weights, plan, inputs, out, options, watch)
    outcome = MergeOutcome(plan.merge_path, options.dtype or stored_dtype(weights), written, remarks=remarks)
    watch.stage("synchronising config and tokenizer")
    outcome.repairs = _settle_files(base, inputs, out, options.dtype, form)
    outcome.receipt_rows = _prove_rendering(inputs, out, outcome.repairs)
    outcome.synced = compare_files(base, out, outcome.repairs)
    _copy_evidence(inputs, out)
    _refuse_broken(out)
    watch.stage("measuring base+adapter against the merged model")
    measure_merge(base, inputs, out, options, outcome, watch)
    return outcome


def _quantised_training(one: AdapterInput, *, original: bool) -> list[str]:
    if not one.trained_quantised:
        return []
    if not original:
        raise quantised_training(one.name)
    return [f"{one.name} was trained on a quantised base and is merged into the base as published"]


def _write(
    weights: WeightFiles,
    plan: MergePlan,
    inputs: Sequence[AdapterInput],
    out: Path,
    options: MergeOptions,
    watch: MergeWatch,
) -> tuple[StreamedMerge, Form]:
    folders = [one.folder for one in inputs]
    form = Form(plan.dtypes)
    if plan.streaming:
        rows: RowSource = LoraRows(folders, plan)
    else:
        merged = merge_with_peft(weights, folders[0])
        rows, form = merged.rows, Form(plan.dtypes, merged.shapes, merged.added)
    total, done = weights.data_size, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        watch.bytes_done(min(done, total), total)
        watch.check()

    identity = [options.base_digest or str(weights.folder), *(f"{one.folder}*{one.weight}" for one in inputs)]
    fingerprint = plan_fingerprint(plan, identity)
    return write_merged(weights, rows, form, out, fingerprint=fingerprint, advance=advance), form


def _remove_leftovers(out: Path) -> None:
    """Delete what an interrupted attempt left beside the weights, so that it is not taken for the base's."""
    for path in out.rglob("*"):
        if path.is_file() and not path.name.endswith((".safetensors", INDEX_FILE)):
            path.unlink()


def _settle_files(base: Path, inputs: Sequence[AdapterInput], out: Path, dtype: str, form: Form) -> list[Finding]:
    _remove_leftovers(out)
    copy_base_files(base, out)
    changes = write_dtype(out, dtype) if dtype else []
    rows = max((shape[0] for name, shape in form.shapes.items() if len(shape) == 2), default=0)
    changes += write_vocabulary(out, rows) if rows else []
    changes += write_untied(out) if form.added else []
    if len(inputs) == 1:
        changes += adopt_tokenizer(out, inputs[0].folder, grown=bool(rows))
    changes += repair_folder(out)
    for one in inputs:
        changes += adopt_training(out, one.folder)
    return changes


def _prove_rendering(inputs: Sequence[AdapterInput], out: Path, repairs: list[Finding]) -> int:
    """Render every receipt again; take the adapter's template when the base's renders other ids, else refuse."""
    rows = 0
    for one in inputs:
        if not (one.folder / RECEIPT_FILE).exists():
            continue
        receipt = load_receipt(one.folder)
        mismatches = receipt_mismatches(out, receipt)
        theirs = chat_template(one.folder)
        if mismatches and theirs and theirs != chat_template(out) and len(inputs) == 1:
            repairs.append(adopt_template(out, one.folder, f"the base's renders other ids ({mismatches[0]})"))
            mismatches = receipt_mismatches(out, receipt)
        if mismatches:
            raise failed_precondition(
                "RECEIPT_MISMATCH",
                f"The merged model's tokenizer does not give the ids that {one.name} was trained on: {mismatches[0]} "
                f"({len(mismatches)} of {len(receipt.rows)} rows). Merge into the base that it was trained on.",
                row=mismatches[0].source,
                position=str(mismatches[0].position),
                expected=str(mismatches[0].expected),
                rendered=str(mismatches[0].rendered),
            )
        rows += len(receipt.rows)
    return rows


def _copy_evidence(inputs: Sequence[AdapterInput], out: Path) -> None:
    """Carry receipt and probes along, for the server of the merged model; only one adapter's make sense together."""
    if len(inputs) != 1 or inputs[0].weight != 1:
        return
    for name in (RECEIPT_FILE, PROBES_FILE):
        if (inputs[0].folder / name).exists():
            shutil.copyfile(inputs[0].folder / name, out / name)


def _refuse_broken(out: Path) -> None:
    grave = [finding for finding in check_folder(out) if finding.severity == "error"]
    if grave:
        raise broken_model(grave)


def broken_model(grave: Sequence[Finding]) -> LoralineError:
    """FAILED_PRECONDITION for a merged folder that a server could not load."""
    first = grave[0]
    return failed_precondition(
        "MODEL_DEFECTIVE",
        f"The merged folder would not load ({len(grave)} errors): {first.code} in {first.file}: {first.message} "
        f"{first.remedy} The base has the same defect; repair it with RepairModel, or use another.",
        codes=",".join(sorted({finding.code for finding in grave})),
        file=first.file,
    )
