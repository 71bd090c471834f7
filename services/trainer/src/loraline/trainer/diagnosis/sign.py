"""An observation about a run, what is known of the run, and the checklists as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.artifacts.refs import format_ref
from loraline.trainer.diagnosis.history import History

PHASES = {
    **dict.fromkeys(("NO_TRAINED_TOKENS", "EOS_NEVER_TAUGHT", "EOS_TAUGHT", "FEW_ROWS"), pb.RUN_PHASE_BEFORE),
    **dict.fromkeys(("ROWS", "ROWS_CUT", "NOTHING_CUT", "NO_EVALUATION"), pb.RUN_PHASE_BEFORE),
    **dict.fromkeys(("PROMPT_REPEATED", "PROMPTS_VARY"), pb.RUN_PHASE_BEFORE),
    **dict.fromkeys(("LOSS_NOT_FINITE", "LOSS_RISES", "LOSS_FLAT", "LOSS_ZERO_FROM_START"), pb.RUN_PHASE_DURING),
    **dict.fromkeys(("UNSTEADY", "STEADY", "GRADIENT_SPIKES", "RESTARTED", "STARTED_ANEW"), pb.RUN_PHASE_DURING),
    **dict.fromkeys(("STILL_FALLING", "SETTLED", "EVAL_LOSS_RISES", "CONTINUED"), pb.RUN_PHASE_DURING),
    **dict.fromkeys(("FINAL_LOSS", "TOKEN_ACCURACY", "EVAL_LOSS", "UNDERFIT"), pb.RUN_PHASE_AFTER),
    "REWARD_ACCURACY": pb.RUN_PHASE_AFTER,
    **dict.fromkeys(("ANSWERS_UNCHANGED", "ANSWERS_CHANGED", "PROBES_UNMOVED", "PROBES_MOVED"), pb.RUN_PHASE_AFTER),
    **dict.fromkeys(("FILES_COMPLETE", "FILES_MISSING"), pb.RUN_PHASE_AFTER),
}
"""The checklists as data: what is looked at before, during and after a run, by code."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run besides its curve; 0 or None where it is not."""

    rows: int = 0
    """Rows that an epoch shows, with repetitions by weight."""
    unique_rows: int = 0
    """The same without repetitions."""
    rows_teaching_eos: int | None = None
    trained_tokens: int | None = None
    earlier: Sequence[History] = ()
    """Runs of the same name before this one, newest first."""
    resumed_from: str = ""
    rows_cut: int | None = None
    """Rows that were truncated or left out for their length."""
    samples: Sequence[pb.SampleAnswers] = ()
    """What base and adapter answered at the end."""
    probe_shift: float | None = None
    """Greatest difference of a token's log-probability between base and adapter, in nats."""
    rank: int = 0
    first_batch: Sequence[pb.BatchRow] = ()
    """What the model was shown first."""
    reward_accuracy: float | None = None
    """Share of pairs whose chosen answer has the greater reward, 0 to 1; None for a run that is not on pairs."""
    published: str | None = None
    """Reference of the adapter or the model that a finished run published; None while it is not known."""
    missing: Sequence[str] = ()
    """What a finished run's result lacks of what it should have left."""


@dataclass(frozen=True)
class Sign:
    """One observation."""

    code: str
    passed: bool
    message: str
    remedy: str = ""
    verdict: pb.Verdict.ValueType = pb.VERDICT_UNSPECIFIED
    """The verdict that it speaks for when it did not pass; UNSPECIFIED for a remark."""
    grave: bool = False

    @property
    def phase(self) -> pb.RunPhase.ValueType:
        """The checklist that it is on."""
        return PHASES[self.code]


def facts_of(result: pb.TrainResult, *, earlier: Sequence[History] = (), rank: int = 0) -> Facts:
    """Return what a finished run's result says besides its curve."""
    receipt, probes = result.receipt, result.probes
    made = result.model if result.HasField("model") else result.adapter
    left = {"weights in the store": made.digest, "a token receipt": receipt.rows, "probes": probes.probes}
    return Facts(
        rows=receipt.rows,
        unique_rows=receipt.unique_rows,
        rows_teaching_eos=receipt.rows_teaching_eos,
        trained_tokens=receipt.trained_tokens,
        earlier=earlier,
        resumed_from=result.resumed_from,
        rows_cut=receipt.truncated_rows + receipt.dropped_rows,
        samples=list(result.samples),
        probe_shift=probes.max_abs_logprob_shift if probes.probes else None,
        rank=rank,
        first_batch=list(result.first_batch),
        reward_accuracy=result.preference.reward_accuracy if result.HasField("preference") else None,
        published=format_ref(made) if made.name else "",
        missing=[what for what, there in left.items() if not there],
    )
