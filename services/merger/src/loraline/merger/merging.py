"""The whole merge over local folders: plan, write, synchronise, repair, prove, measure. Publishes nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraline.core.errors import unsupported
from loraline.merger.adapter import Adapter, check_base, open_adapter
from loraline.merger.check.findings import Finding
from loraline.merger.engines import dequantised
from loraline.merger.engines.combining import combine
from loraline.merger.engines.deltas import LoraRows, RowSource
from loraline.merger.engines.judgement import Rival, measure_merge
from loraline.merger.engines.measure import Measurement
from loraline.merger.engines.peft_merge import merge_with_peft
from loraline.merger.engines.streaming import StreamedMerge, write_merged
from loraline.merger.memory import PeakMemory
from loraline.merger.plan import MergePlan, make_plan, plan_fingerprint, stored_dtype
from loraline.merger.settling import copy_evidence, prove_rendering, refuse_broken, settle_files
from loraline.merger.spec import CombineChoice, MeasureSettings, MergeBaseChoice, MergeBounds
from loraline.merger.sync import SyncedFile, compare_files
from loraline.merger.weights.header import Form
from loraline.merger.weights.layout import WeightFiles, open_weights


@dataclass(frozen=True)
class AdapterInput:
    """An adapter's folder, its weight and what to call it in messages."""

    folder: Path
    weight: float = 1.0
    name: str = "the adapter"
    trained_quantised: str = ""
    """How the base was quantised in training, such as `nf4`; empty for 16 or 32 bits."""


@dataclass(frozen=True)
class MergeOptions:
    """What the caller may choose."""

    dtype: str = ""
    bounds: MergeBounds = field(default_factory=MergeBounds)
    merge_base: MergeBaseChoice = "measured"
    base_digest: str = ""
    """Digest of the base artifact; empty for a folder or a Hub model."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    combine: CombineChoice = "linear"
    density: float = 0.0


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
    """In the order measured; the last is that of the weights as they are published."""
    receipt_rows: int = 0
    remarks: list[str] = field(default_factory=list)
    merge_base: MergeBaseChoice = "original"
    merge_seconds: float = 0.0
    measure_seconds: float = 0.0
    peak_bytes: int = 0
    """Greatest anonymous memory of this process while weights were written."""


@dataclass(frozen=True)
class _Merge:
    """The parts of one merge that several steps share."""

    weights: WeightFiles
    plan: MergePlan
    folders: tuple[Path, ...]
    identity: tuple[str, ...]
    quantised: str
    """The training's quantisation, where the dequantised base can be made from it."""


def merge_folders(
    base: Path, inputs: Sequence[AdapterInput], out: Path, options: MergeOptions, watch: MergeWatch = MergeWatch()
) -> MergeOutcome:
    """Merge adapters into a base and write a complete model folder to `out`, or raise a typed error.

    `out` may hold finished shards of an interrupted attempt at the same merge; they are kept. Its parent folder takes
    working files. Nothing of the inputs is written to.
    """
    begin, memory = time.monotonic(), PeakMemory()
    weights = open_weights(base)
    adapters = [open_adapter(one.folder) for one in inputs]
    remarks: list[str] = []
    for adapter, one in zip(adapters, inputs, strict=True):
        remarks += check_base(adapter, name=one.name, base=base, base_digest=options.base_digest)
    pairs = [(adapter, one.weight) for adapter, one in zip(adapters, inputs, strict=True)]
    merge, how = _prepare(weights, pairs, inputs, out, options, remarks)
    watch.stage(f"merging ({merge.plan.merge_path}{how})")
    choice: MergeBaseChoice = "dequantized" if options.merge_base == "dequantized" else "original"
    written, form = _write(merge, out, watch, memory, choice)
    dtype = options.dtype or stored_dtype(weights)
    outcome = MergeOutcome(f"{merge.plan.merge_path}{how}", dtype, written, remarks=remarks, merge_base=choice)
    watch.stage("synchronising config and tokenizer")
    outcome.repairs = settle_files(base, inputs, out, options.dtype, form)
    outcome.receipt_rows = prove_rendering(inputs, out, outcome.repairs)
    outcome.synced = compare_files(base, out, outcome.repairs)
    copy_evidence(inputs, out)
    refuse_broken(out)
    outcome.merge_seconds, outcome.peak_bytes = time.monotonic() - begin, memory.greatest
    watch.stage("measuring base+adapter against the merged model")
    measure_merge(base, inputs, out, options, outcome, watch, _measured(merge, inputs, options, out, watch))
    outcome.measure_seconds = time.monotonic() - begin - outcome.merge_seconds
    return outcome


def _prepare(
    weights: WeightFiles,
    pairs: Sequence[tuple[Adapter, float]],
    inputs: Sequence[AdapterInput],
    out: Path,
    options: MergeOptions,
    remarks: list[str],
) -> tuple[_Merge, str]:
    """Combine adapters where asked, plan the merge, and decide whether the dequantised base takes part."""
    identity = [options.base_digest or str(weights.folder), *(f"{one.folder}*{one.weight}" for one in inputs)]
    how, folders = "", [one.folder for one in inputs]
    if options.combine != "linear":
        folder, said = combine(weights.folder, pairs, options.combine, options.density, out.parent)
        how, folders, pairs = f", {said}", [folder], [(open_adapter(folder), 1.0)]
        identity.append(said)
    plan = make_plan(weights, pairs, options.dtype)
    kinds = {one.trained_quantised for one in inputs}
    kind = kinds.pop() if len(kinds) == 1 else ""
    why = _why_not_dequantised(kind, plan, inputs, options)
    if options.merge_base == "dequantized" and why:
        raise unsupported(f"merge_base MERGE_BASE_DEQUANTIZED where {why}", "Use MERGE_BASE_ORIGINAL.")
    if any(one.trained_quantised for one in inputs) and why:
        remarks.append(f"trained on a quantised base and merged into the base as published, as {why}")
    return _Merge(weights, plan, tuple(folders), tuple(identity), "" if why else kind), how


def _why_not_dequantised(kind: str, plan: MergePlan, inputs: Sequence[AdapterInput], options: MergeOptions) -> str:
    if not kind:
        named = any(one.trained_quantised for one in inputs)
        return (
            "the adapters were trained on bases of several kinds" if named else "the training's base was not quantised"
        )
    if options.merge_base == "original":
        return "that was asked for"
    if kind not in dequantised.KINDS:
        return f"{kind} cannot be repeated here"
    if not plan.streaming:
        return "this adapter cannot be streamed"
    return "" if dequantised.available() else "loraline-merger[quantization] is not installed"


def _measured(
    merge: _Merge, inputs: Sequence[AdapterInput], options: MergeOptions, out: Path, watch: MergeWatch
) -> Rival:
    """Say what is measured: the adapters as merged, the base as trained, and the other merge to choose from."""
    pairs = [(one.folder, one.weight) for one in inputs]
    if options.combine != "linear":
        pairs = [(merge.folders[0], 1.0)]
    if not merge.quantised:
        return Rival(pairs)
    prepare = dequantised.prepare(merge.quantised, dequantised.main_dtype(merge.weights))
    if options.merge_base != "measured":
        return Rival(pairs, prepare)

    def write() -> Path:
        target = out.with_name(f"{out.name}.dequantized")
        quiet = replace(watch, bytes_done=lambda done, total: None)
        _write(merge, target, quiet, PeakMemory(), "dequantized")
        return target

    return Rival(pairs, prepare, write)


def _write(
    merge: _Merge, out: Path, watch: MergeWatch, memory: PeakMemory, choice: MergeBaseChoice
) -> tuple[StreamedMerge, Form]:
    plan, form = merge.plan, Form(merge.plan.dtypes)
    if plan.streaming:
        rows: RowSource = LoraRows(merge.folders, plan)
        if choice == "dequantized":
            rows = dequantised.dequantised_rows(merge.weights, rows, merge.quantised)
    else:
        merged = merge_with_peft(merge.weights, merge.folders[0])
        rows, form = merged.rows, Form(plan.dtypes, merged.shapes, merged.added)
    total, done = merge.weights.data_size, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        memory.sample()
        watch.bytes_done(min(done, total), total)
        watch.check()

    fingerprint = plan_fingerprint(plan, [*merge.identity, choice])
    return write_merged(merge.weights, rows, form, out, fingerprint=fingerprint, advance=advance), form
