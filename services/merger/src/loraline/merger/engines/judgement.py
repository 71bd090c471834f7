"""Decides by measurement whether a merge may be published: runs the comparison and holds it against the bounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.probes import compare_logprobs, load_probes
from loraline.merger.engines.measure import Measurement, Reference, compute_reference, measure_folder
from loraline.merger.engines.rendering import load_tokenizer
from loraline.merger.engines.streaming import STATE_FILE
from loraline.merger.spec import MeasureSettings, MergeBounds
from loraline.merger.texts import MeasuredText, collect_texts

if TYPE_CHECKING:
    from loraline.merger.merging import AdapterInput, MergeOptions, MergeOutcome, MergeWatch

_NO_SIGNAL = 1e-3
"""Below this difference between base and adapter, in nats, a comparison proves nothing."""
RECORDED_SUBJECT = "adapter as the trainer measured it"


@dataclass(frozen=True)
class Rival:
    """What a merge is measured against, and with what it competes."""

    pairs: Sequence[tuple[Path, float]]
    """The adapters as they were merged, with weights."""
    prepare: Callable[[Any], None] | None = None
    """Makes the loaded base the one that the training saw."""
    write: Callable[[], Path] | None = None
    """Writes the weights of the other merge, into the dequantised base; the better of the two is published."""


def measure_merge(
    base: Path,
    inputs: Sequence[AdapterInput],
    out: Path,
    options: MergeOptions,
    outcome: MergeOutcome,
    watch: MergeWatch,
    rival: Rival,
) -> None:
    """Measure the folder as written and add the rows to the outcome; where a rival answers better, take its weights.

    Raises FAILED_PRECONDITION: MERGE_CHANGED_MODEL above a bound, ADAPTER_CHANGED when base+adapter does not answer as
    the trainer recorded.
    """
    dtype = torch.float32 if options.measure.dtype == "float32" else "auto"
    texts = _texts([one.folder for one in inputs], out, options.measure)
    path = out.with_name(out.name + ".reference.f32")
    prepare = rival.prepare or (lambda model: None)
    subject = f"merged {outcome.dtype}" + (f" into the {outcome.merge_base} base" if rival.prepare else "")
    try:
        reference = compute_reference(base, rival.pairs, texts, path, dtype=dtype, check=watch.check, prepare=prepare)
        if len(inputs) == 1 and inputs[0].weight == 1:
            _against_record(reference, inputs[0], options, outcome)
        merged = measure_folder(out, reference, subject, dtype=dtype, check=watch.check)
        if rival.write is not None:
            merged = _better(merged, rival.write(), reference, out, options, outcome, watch)
    finally:
        path.unlink(missing_ok=True)
    within = within_bounds(merged, options, outcome.dtype)
    outcome.measurements.append((merged, within))
    if not within:
        raise changed_model(merged, options.bounds, outcome.dtype)
    if merged.base_to_adapter_diff < _NO_SIGNAL:
        outcome.remarks.append(
            f"the adapter moves the base by at most {merged.base_to_adapter_diff:.2g} nats on the measured texts: "
            "the comparison proves little, and the adapter does little"
        )


def _texts(evidence: Sequence[Path], tokenizer: Path, settings: MeasureSettings) -> list[MeasuredText]:
    def encode(text: str) -> list[int]:
        return load_tokenizer(tokenizer).encode(text)

    texts = collect_texts(evidence, encode, max_tokens=settings.tokens, max_length=settings.length)
    if not texts:
        raise failed_precondition(
            "NOTHING_TO_MEASURE", "No text of the adapter fits into the measured length. Raise it on the server."
        )
    return texts


def _better(
    merged: Measurement, other: Path, reference: Reference, out: Path, options: MergeOptions, outcome: MergeOutcome,
    watch: MergeWatch,
) -> Measurement:  # fmt: skip
    """Measure the rival's weights beside the same files; `out` then holds the better, whose figures are returned."""
    dtype = torch.float32 if options.measure.dtype == "float32" else "auto"
    weights = [path.relative_to(other) for path in other.rglob("*") if path.is_file()]
    for path in out.rglob("*"):
        relative = path.relative_to(out)
        if path.is_file() and relative not in weights:
            (other / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, other / relative)
    subject = f"merged {outcome.dtype} into the dequantized base"
    rival = measure_folder(other, reference, subject, dtype=dtype, check=watch.check)
    if rival.mean_kl >= merged.mean_kl:
        outcome.measurements.append((rival, within_bounds(rival, options, outcome.dtype)))
        shutil.rmtree(other)
        return merged
    outcome.measurements.append((merged, within_bounds(merged, options, outcome.dtype)))
    # A process that dies between two files must not take this mixture for finished shards of the first merge.
    out.with_name(out.name + STATE_FILE).unlink(missing_ok=True)
    for relative in weights:
        (other / relative).replace(out / relative)
    shutil.rmtree(other)
    outcome.merge_base = "dequantized"
    return rival


def measure_export(
    source: Path, out: Path, subject: str, gguf_file: str, settings: MeasureSettings, watch: MergeWatch
) -> Measurement:
    """Measure an exported folder, or a GGUF file in it, against the model it was made from."""
    dtype = torch.float32 if settings.dtype == "float32" else "auto"
    texts = _texts([source], source, settings)
    path = out.with_name(out.name + ".reference.f32")
    try:
        reference = compute_reference(source, [], texts, path, dtype=dtype, check=watch.check)
        return measure_folder(out, reference, subject, dtype=dtype, check=watch.check, gguf_file=gguf_file)
    finally:
        path.unlink(missing_ok=True)


def within_bounds(measurement: Measurement, options: MergeOptions, dtype: str) -> bool:
    """Whether both figures are within the bounds; undefined figures are not."""
    limit = options.bounds.max_diff_for(dtype)
    return measurement.max_abs_logprob_diff <= limit and measurement.mean_kl <= options.bounds.max_kl


def _against_record(reference: Reference, adapter: AdapterInput, options: MergeOptions, outcome: MergeOutcome) -> None:
    """Compare base+adapter, as computed here, with what the trainer recorded."""
    pairs = [
        (list(text.recorded), own)
        for text, own in zip(reference.texts, reference.own_logprobs, strict=True)
        if text.recorded
    ]
    if not pairs:
        return
    found = compare_logprobs([recorded for recorded, _ in pairs], [own for _, own in pairs])
    limit = options.bounds.max_diff_for("bf16")
    within = found.max_abs <= limit
    row = Measurement(RECORDED_SUBJECT, found.tokens, 0.0, 0.0, found.max_abs, 0.0, reference.base_to_adapter_diff)
    outcome.measurements.append((row, within))
    if within:
        return
    message = (
        f"Base and adapter answer up to {found.max_abs:.3g} nats away from what the trainer recorded (bound {limit:g})"
    )
    exact = load_probes(adapter.folder).dtype == "float32"
    if exact and not adapter.trained_quantised:
        raise failed_precondition(
            "ADAPTER_CHANGED",
            f"{message}. Base or adapter are not those of the training; take both from the training's artifacts.",
            max_abs_logprob_diff=f"{found.max_abs:.6g}",
            bound=f"{limit:g}",
        )
    outcome.remarks.append(f"{message}; the training did not compute in float32, or ran on a quantised base")


def changed_model(
    found: Measurement, bounds: MergeBounds, dtype: str, *, reference: str = "base+adapter"
) -> LoralineError:
    """FAILED_PRECONDITION with the figures."""
    limit = bounds.max_diff_for(dtype)
    moved = (
        f", where the adapter moves the base by {found.base_to_adapter_diff:.3g}" if found.base_to_adapter_diff else ""
    )
    return failed_precondition(
        "MERGE_CHANGED_MODEL",
        f"{found.subject}: the model as written does not answer like {reference}: "
        f"greatest difference {found.max_abs_logprob_diff:.3g} nats (bound {limit:g}), "
        f"mean KL {found.mean_kl:.3g} nats (bound {bounds.max_kl:g}), on {found.tokens} tokens{moved}. "
        "Nothing was published. Try a wider type or a higher bound, or serve the adapter unmerged.",
        max_abs_logprob_diff=f"{found.max_abs_logprob_diff:.6g}",
        mean_kl=f"{found.mean_kl:.6g}",
        max_kl=f"{found.max_kl:.6g}",
        top1_agreement=f"{found.top1_agreement:.6g}",
        base_to_adapter_diff=f"{found.base_to_adapter_diff:.6g}",
        bound_diff=f"{limit:g}",
        bound_kl=f"{bounds.max_kl:g}",
        tokens=str(found.tokens),
    )
