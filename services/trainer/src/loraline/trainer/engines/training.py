"""A whole run over local folders: base and datasets in, an adapter's folder with its evidence out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import GenerationConfig

from loraline.core.evidence.probes import ProbeSet
from loraline.core.evidence.receipt import TokenReceipt
from loraline.trainer.base_models import ResolvedBase
from loraline.trainer.batch_view import FILE_NAME as FIRST_BATCH
from loraline.trainer.engines import adapter_folder, ranks, sft
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.characters import check_characters
from loraline.trainer.engines.encoding import ChatEncoder, eos_ids_of
from loraline.trainer.engines.lengths import LengthRule
from loraline.trainer.engines.loading import (
    Precision,
    check_vocabulary,
    choose_precision,
    load_tokenizer,
    model_limits,
)
from loraline.trainer.engines.memory import train_within_memory
from loraline.trainer.engines.preferences import prepare_pairs
from loraline.trainer.engines.preparing import PreparedData, left_out, prepare
from loraline.trainer.engines.proving import prove
from loraline.trainer.engines.samples import FILE_NAME as SAMPLES
from loraline.trainer.engines.samples import Sample, SampleAnswers, sample_prompts
from loraline.trainer.rows import LoadedDataset, mix
from loraline.trainer.spec import TrainingSpec


@dataclass(frozen=True)
class RunInputs:
    """What a run is made from."""

    name: str
    base: ResolvedBase
    datasets: Sequence[LoadedDataset]
    validation_fraction: float
    dataset_names: Sequence[str] = ()
    """References of the datasets, for the model card."""
    init_adapter: Path | None = None
    """Folder of the adapter to start from; None for a fresh one."""
    init_adapter_name: str = ""
    """Its reference, for the model card."""
    sample_prompts: Sequence[str] = ()
    """Prompts to answer besides those drawn from the rows."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end; `folder` is ready to be published."""

    folder: Path
    run: sft.TrainedRun
    figures: dict[str, float]
    receipt: TokenReceipt
    probes: ProbeSet
    precision: Precision
    target_modules: list[str]
    samples: list[Sample]
    """Answers of base and adapter, at each evaluation and at the end."""
    rejected: TokenReceipt | None = None
    """Receipt of the rejected answers, where pairs were compared."""

    @property
    def last_samples(self) -> list[Sample]:
        """Those at the end."""
        last = max((sample.step for sample in self.samples), default=0)
        return [sample for sample in self.samples if sample.step == last]


def run(inputs: RunInputs, spec: TrainingSpec, workdir: Path, observer: RunObserver) -> FinishedRun | None:
    """Train and prove. None when the run was asked to stop; its checkpoint is in `workdir` then.

    Of several processes that train together the first alone writes; the others get None.
    """
    base = inputs.base
    precision = choose_precision(spec.dtype, spec.quantization, base.folder, full=spec.full)
    tokenizer = load_tokenizer(base.folder, remote_code=base.trust_remote_code)
    longest, vocab_rows = model_limits(base.folder, remote_code=base.trust_remote_code)
    check_vocabulary(tokenizer, vocab_rows)
    encoder = ChatEncoder(tokenizer, eos_ids_of(tokenizer, _generation_eos(base.folder)))
    data = _prepare(inputs, spec, encoder, longest, observer)
    target = workdir / ("model" if spec.full else "adapter")
    if ranks.first():
        _begin(data, spec, precision, workdir, target, observer)
    checkpoints = workdir / "checkpoints"
    prompts = sample_prompts(inputs.sample_prompts, data.train, data.validation, seed=spec.seed)
    samples = SampleAnswers(prompts, encoder, workdir / SAMPLES, observer)
    start = sft.Start(inputs.init_adapter, samples, workdir / FIRST_BATCH)
    trained, spec = train_within_memory(base, tokenizer, data, spec, precision, checkpoints, observer, target, start)
    writes = ranks.first()
    ranks.part()
    if trained.stopped or not writes:
        return None
    figures = sft.final_figures(trained.log)
    probes = prove(base, target, encoder, data, precision, observer, seed=spec.seed)
    targets = [] if spec.full else adapter_folder.adapter_config(target)["target_modules"]
    finished = FinishedRun(
        target, trained, figures, data.receipt, probes, precision, targets, samples.taken, data.rejected
    )
    adapter_folder.complete(target, finished, inputs, spec, encoder)
    shutil.copyfile(workdir / FIRST_BATCH, target / FIRST_BATCH)
    return finished


def _begin(
    data: PreparedData, spec: TrainingSpec, precision: Precision, workdir: Path, target: Path, observer: RunObserver
) -> None:
    """Put the receipts on disk before the first step: what a run trains on is known even if it never ends."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    data.receipt.save(workdir)
    observer.note(_receipt_line(data), reason="TOKEN_RECEIPT")
    if data.rejected is not None:
        data.rejected.save(workdir, adapter_folder.REJECTED)
        counts = data.rejected.counts
        told = f"rejected answers: {counts.rows} rows, {counts.tokens} tokens, {counts.trained_tokens} of them compared"
        observer.note(told, reason="TOKEN_RECEIPT_REJECTED")
    if told := left_out(data.receipt.counts, spec.max_truncated_share):
        observer.note(told, severity="warning", reason="ROWS_LEFT_OUT")
    observer.note(f"quantisation: {precision.note}; weights in {precision.dtype}", reason="PRECISION")
    if precision.fallback:
        observer.count("quantization_fallbacks")
        observer.note(f"trains without quantisation: {precision.fallback}", severity="warning", reason="NOT_QUANTIZED")


def _prepare(
    inputs: RunInputs, spec: TrainingSpec, encoder: ChatEncoder, longest: int, observer: RunObserver
) -> PreparedData:
    mixture = mix(inputs.datasets, validation_fraction=inputs.validation_fraction, seed=spec.seed)
    told = check_characters([*mixture.train, *mixture.validation], encoder.tokenizer)
    if told and ranks.first():
        observer.note(told, severity="warning", reason="SPECIAL_CHARACTERS_LOST")
    rule = LengthRule(spec.max_length, spec.length_policy, spec.max_truncated_share)
    if 0 < longest < rule.max_length:
        rule = replace(rule, max_length=longest)
        if ranks.first():
            bounded = f"rows may have {longest} tokens, what the base takes, in place of max_length {spec.max_length}"
            observer.note(bounded, reason="MAX_LENGTH_BOUNDED")
    make = prepare_pairs if spec.preference else prepare
    return make(mixture, encoder, rule, allow_unlearned_eos=spec.allow_unlearned_eos)


def _generation_eos(folder: Path) -> int | list[int] | None:
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(str(folder)).eos_token_id


def _receipt_line(data: PreparedData) -> str:
    counts = data.receipt.counts
    return (
        f"{counts.rows} rows, {counts.tokens} tokens, {counts.trained_tokens} of them carry loss "
        f"({data.receipt.mask_method}); {counts.rows_teaching_eos} rows teach the end of an answer, "
        f"{counts.truncated_rows} were cut, {counts.dropped_rows} dropped, {counts.split_rows} split; "
        f"{len(data.validation)} rows for validation"
    )
