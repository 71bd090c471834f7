"""From a finished run to the messages of the contract."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.evidence.probes import ProbeSet
from loraline.core.evidence.receipt import TokenReceipt
from loraline.trainer.batch_view import FILE_NAME as FIRST_BATCH
from loraline.trainer.batch_view import load_rows

if TYPE_CHECKING:
    from loraline.trainer.engines.training import FinishedRun

_MAX_POINTS = 2000


def train_result(finished: FinishedRun, made: artifact_pb2.ArtifactRef, base: pb.BaseModel) -> pb.TrainResult:
    """Return the result of a training job; `made` is the adapter or the model that was published."""
    run = finished.run
    result = pb.TrainResult(
        base_model=base,
        final_loss=finished.figures["loss"],
        token_accuracy=finished.figures["token_accuracy"],
        steps=run.steps,
        epochs=run.epochs,
        tokens=run.tokens,
        train_seconds=run.train_seconds,
        receipt=receipt_summary(finished.receipt),
        probes=probe_summary(finished.probes),
        loss_curve=loss_curve(run.log),
        quantization_note=finished.precision.note,
        resumed_from=run.resumed_from,
        samples=[pb.SampleAnswers(**asdict(sample)) for sample in finished.last_samples],
        first_batch=load_rows(finished.folder / FIRST_BATCH),
    )
    (result.model if made.kind == artifact_pb2.ARTIFACT_KIND_MODEL else result.adapter).CopyFrom(made)
    if finished.rejected is not None:
        preference = pb.PreferenceSummary(
            rejected_receipt=receipt_summary(finished.rejected),
            reward_accuracy=finished.figures["reward_accuracy"],
            reward_margin=finished.figures["reward_margin"],
        )
        result.preference.CopyFrom(preference)
    if "eval_loss" in finished.figures:
        result.eval_loss = finished.figures["eval_loss"]
    return result


def receipt_summary(receipt: TokenReceipt) -> pb.ReceiptSummary:
    """Return the counts of a token receipt."""
    counts = receipt.counts
    return pb.ReceiptSummary(
        rows=counts.rows,
        tokens=counts.tokens,
        trained_tokens=counts.trained_tokens,
        truncated_rows=counts.truncated_rows,
        dropped_rows=counts.dropped_rows,
        fully_masked_rows=counts.fully_masked_rows,
        rows_teaching_eos=counts.rows_teaching_eos,
        split_rows=counts.split_rows,
        unique_rows=counts.unique_rows,
        dropped_validation_rows=counts.dropped_validation_rows,
        mask_method=receipt.mask_method,
        chat_template_sha256=receipt.chat_template_sha256,
    )


def probe_summary(probes: ProbeSet) -> pb.ProbeSummary:
    """Return the figures of the probes."""
    return pb.ProbeSummary(
        probes=len(probes.probes),
        max_abs_logprob_shift=probes.max_shift,
        mean_base_logprob=probes.mean_base_logprob,
        mean_adapter_logprob=probes.mean_adapter_logprob,
    )


def loss_curve(log: list[dict[str, Any]]) -> list[pb.LossPoint]:
    """Return the curve from transformers' log history; a long one is thinned, evaluations always stay."""
    evaluations = {int(entry["step"]): float(entry["eval_loss"]) for entry in log if "eval_loss" in entry}
    steps = [entry for entry in log if "loss" in entry]
    stride = math.ceil(len(steps) / _MAX_POINTS) or 1
    points = []
    for number, entry in enumerate(steps):
        step = int(entry["step"])
        if number % stride and step not in evaluations and number != len(steps) - 1:
            continue
        point = pb.LossPoint(
            step=step,
            loss=float(entry["loss"]),
            token_accuracy=float(entry.get("mean_token_accuracy", 0.0)),
            learning_rate=float(entry.get("learning_rate", 0.0)),
            grad_norm=float(entry.get("grad_norm", 0.0)),
        )
        if step in evaluations:
            point.eval_loss = evaluations[step]
        points.append(point)
    return points
