"""The verdict on a run, with its reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.diagnosis import run_signs, signs
from loraline.trainer.diagnosis.history import History
from loraline.trainer.diagnosis.sign import Facts, Sign


@dataclass(frozen=True)
class Judgement:
    """What a loss curve says."""

    verdict: pb.Verdict.ValueType
    signs: list[Sign]
    """Gravest first; those that passed last."""

    @property
    def settled(self) -> bool:
        """Whether the loss was seen to have come to rest; a run of a few steps shows neither that nor the contrary."""
        return any(sign.code == "SETTLED" for sign in self.signs)


_LOOKS: tuple[Callable[[History, Facts], Sign | None], ...] = (
    signs.not_a_number,
    signs.rising,
    signs.nothing_to_learn,
    signs.flat,
    run_signs.end_not_taught,
    signs.overfit,
    signs.loss_level,
    signs.accuracy_level,
    signs.still_falling,
    signs.unsteady,
    signs.started_anew,
    signs.spikes,
    run_signs.few_rows,
    run_signs.length_losses,
    run_signs.repeated_prompt,
    signs.evaluation,
    run_signs.answers,
    run_signs.probes,
    run_signs.preferences,
    run_signs.files,
)
_OF_ANSWERS = (signs.loss_level, signs.accuracy_level)
"""The bands of a run that learns answers; the loss on pairs begins at 0.69 whatever they are."""
# The first verdict of these that a failed sign gives is the run's.
_ORDER = (
    pb.VERDICT_DIVERGED,
    pb.VERDICT_DATA_BUG,
    pb.VERDICT_NO_SIGNAL,
    pb.VERDICT_OVERFIT,
    pb.VERDICT_UNDERTRAINED,
    pb.VERDICT_FAIR,
)


def judge(history: History, facts: Facts | None = None) -> Judgement:
    """Look at a run from every side; `facts` are what is known besides its curve."""
    known = facts or Facts()
    looks = _LOOKS if known.reward_accuracy is None else [look for look in _LOOKS if look not in _OF_ANSWERS]
    found = [sign for look in looks if (sign := look(history, known)) is not None]
    given = {sign.verdict for sign in found if not sign.passed}
    verdict = next((verdict for verdict in _ORDER if verdict in given), pb.VERDICT_GOOD)
    rank = {value: number for number, value in enumerate(_ORDER)}
    found.sort(key=lambda sign: (sign.passed, rank.get(sign.verdict, len(_ORDER))))
    return Judgement(verdict, found)
