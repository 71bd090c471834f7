"""What a pipeline run leaves to show: outcomes by stage, answers, and the evidence with its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.inference.v1 import inference_pb2
from loraline.api.job.v1 import job_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.refs import format_ref
from loraline.client.resources.inference import Answer

NOTICEABLE_SHIFT = 0.05
"""Least difference between base and adapter, in nats, for a comparison between them to mean anything."""


@dataclass
class StageOutcome:
    """One finished stage. `how` says what was not the usual way: `already done`, `resumed after FAILED`, …"""

    stage: str
    how: str = ""
    job: str = ""
    artifact: artifact_pb2.Artifact | None = None
    seconds: float = 0.0
    result: Message | None = None
    served: inference_pb2.ServedModel | None = None
    detail: str = ""

    @property
    def artifact_text(self) -> str:
        """The artifact's reference as text; empty when the stage made none."""
        return format_ref(self.artifact.ref) if self.artifact is not None else ""


@dataclass(frozen=True)
class AskedPrompt:
    """A question with the answers by who was asked (`base`, `tuned`, `merged`)."""

    group: str
    prompt: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Check:
    """One piece of evidence: whether it holds, and the figures that say so."""

    name: str
    passed: bool
    figures: str


class Observer(Protocol):
    """Whoever shows a run while it goes on."""

    def started(self, stage: str, what: str) -> None:
        """Tell that a stage begins."""

    def sent(self, stage: str, done: int, total: int) -> None:
        """Tell how many bytes of an upload are sent."""

    def job_update(self, stage: str, update: job_pb2.WatchJobResponse) -> None:
        """Tell an event of a stage's job."""

    def remark(self, stage: str, text: str) -> None:
        """Tell something worth knowing."""

    def finished(self, outcome: StageOutcome) -> None:
        """Tell that a stage is done."""


@dataclass
class PipelineReport:
    """A finished run."""

    pipeline: str
    outcomes: list[StageOutcome] = field(default_factory=list)
    answers: list[AskedPrompt] = field(default_factory=list)
    markers: tuple[str, ...] = ()
    seconds: float = 0.0
    expected: frozenset[str] = frozenset()
    """Stages of the pipeline that owe evidence: `train`, `merge`, `serve` (an adapter), `ask` (with markers)."""

    def result(self, kind: type[Any]) -> Any:
        """Return the result of a type, such as TrainResult; None when no stage made one."""
        return next((outcome.result for outcome in self.outcomes if isinstance(outcome.result, kind)), None)

    @property
    def proof(self) -> inference_pb2.LoadProof | None:
        """The proof at load, when an adapter is served."""
        served = next((outcome.served for outcome in self.outcomes if outcome.served is not None), None)
        return served.proof if served is not None and served.HasField("proof") else None

    def checks(self) -> list[Check]:
        """Return every piece of evidence that this run should have given; what is missing does not hold."""
        checks: list[Check] = []
        train: trainer_pb2.TrainResult | None = self.result(trainer_pb2.TrainResult)
        merge: merger_pb2.MergeResult | None = self.result(merger_pb2.MergeResult)
        if train is not None:
            checks += [check_receipt(train.receipt), check_probes(train.probes)]
        elif "train" in self.expected:
            checks += [missing("token receipt"), missing("probes")]
        if merge is not None:
            checks.append(check_merge(merge))
        elif "merge" in self.expected:
            checks.append(missing("measured merge"))
        adapter_served = any(
            outcome.served is not None and outcome.served.kind == inference_pb2.SERVED_KIND_ADAPTER
            for outcome in self.outcomes
        )
        if adapter_served or "serve" in self.expected:
            checks.append(check_proof(self.proof))
        return checks


def missing(name: str) -> Check:
    """Return that a piece of evidence is not there."""
    return Check(name, False, "the run gave none")


def check_receipt(receipt: trainer_pb2.ReceiptSummary) -> Check:
    """The token receipt: rows carry loss, none is fully masked, and answers learn to end."""
    passed = receipt.trained_tokens > 0 and receipt.fully_masked_rows == 0 and receipt.rows_teaching_eos > 0
    repeated = 0 < receipt.unique_rows < receipt.rows
    unique = f" ({receipt.unique_rows} without repetitions)" if repeated else ""
    figures = (
        f"{receipt.rows} rows{unique}, {receipt.tokens} tokens, {receipt.trained_tokens} carry loss, "
        f"{receipt.rows_teaching_eos} rows teach the end; truncated {receipt.truncated_rows}, "
        f"dropped {receipt.dropped_rows}, split {receipt.split_rows}, fully masked {receipt.fully_masked_rows}"
    )
    return Check("token receipt", passed, figures)


def check_probes(probes: trainer_pb2.ProbeSummary) -> Check:
    """The probes: the adapter moves the base's log-probabilities, and towards the taught answers."""
    towards = probes.mean_adapter_logprob > probes.mean_base_logprob
    passed = probes.probes > 0 and probes.max_abs_logprob_shift > NOTICEABLE_SHIFT and towards
    figures = (
        f"{probes.probes} prompts, mean log-probability {probes.mean_base_logprob:.2f} (base) to "
        f"{probes.mean_adapter_logprob:.2f} (adapter), greatest shift {probes.max_abs_logprob_shift:.2f} nats"
    )
    return Check("probes", passed, figures)


def check_merge(merge: merger_pb2.MergeResult) -> Check:
    """The measured merge: within its bound, on tokens where the adapter makes a difference."""
    rows: Sequence[merger_pb2.MergeMeasurement] = merge.measurements
    passed = bool(rows) and all(
        row.within_bound and row.tokens > 0 and row.base_to_adapter_diff > row.max_abs_logprob_diff for row in rows
    )
    figures = "; ".join(
        f"{row.subject}: {row.tokens} tokens, KL {row.mean_kl:.2g} nats, greatest difference "
        f"{row.max_abs_logprob_diff:.2g} nats (adapter against base: {row.base_to_adapter_diff:.2g})"
        + (f", same next token {row.top1_agreement:.1%}" if row.top1_agreement else "")
        for row in rows
    )
    return Check("measured merge", passed, figures or "nothing was measured")


def check_proof(proof: inference_pb2.LoadProof | None) -> Check:
    """The proof at load: what answers is what was trained, and is not the base."""
    if proof is None:
        return Check("load proof", False, "the server gave none")
    passed = (
        proof.tokens > 0
        and proof.mean_abs_diff_from_trainer <= proof.bound
        and proof.max_abs_diff_from_base > NOTICEABLE_SHIFT
        and proof.receipt_rows_matched > 0
    )
    figures = (
        f"{proof.tokens} tokens: mean difference from the trainer {proof.mean_abs_diff_from_trainer:.2g} nats "
        f"(bound {proof.bound:.2g}), greatest {proof.max_abs_diff_from_trainer:.2g}; from the base "
        f"{proof.max_abs_diff_from_base:.2f}; {proof.receipt_rows_matched} receipt rows render to equal ids"
    )
    return Check("load proof", passed, figures)


def marked_share(answers: Sequence[AskedPrompt], who: str, markers: Sequence[str]) -> tuple[int, int]:
    """Return how many of `who`'s answers carry a mark of the style, and how many there are."""
    texts = [entry.answers[who].text.lower() for entry in answers if who in entry.answers]
    return sum(any(marker.lower() in text for marker in markers) for text in texts), len(texts)
