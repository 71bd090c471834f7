"""Verdicts on curves of known shape, the advice that goes with them, and the page."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.trainer import diagnosis
from loraline.trainer.diagnosis.advice import config_patch
from loraline.trainer.diagnosis.bands import accuracy_band, loss_band
from loraline.trainer.diagnosis.history import History, Point, from_trainer_state
from loraline.trainer.diagnosis.judging import judge
from loraline.trainer.diagnosis.page import as_pipeline
from loraline.trainer.diagnosis.sign import PHASES, Facts
from loraline.trainer.diagnosis.subject import Subject, diagnose, from_file
from loraline.trainer.spec import resolve, training_spec

STEPS = 200


def curve(
    loss: Callable[[float], float],
    *,
    accuracy: Callable[[float], float] | None = None,
    evaluation: Callable[[float], float] | None = None,
    noise: float = 0.02,
) -> History:
    """Return a history whose loss is a function of the share of the run that is done, with some noise."""
    draw = random.Random(3)
    points = []
    for step in range(1, STEPS + 1):
        share = step / STEPS
        value = loss(share) * (1 + draw.uniform(-noise, noise))
        points.append(Point(step, value, accuracy(share) if accuracy else None, 1e-4, 1.0))
    evaluations = [(step, evaluation(step / STEPS)) for step in range(20, STEPS + 1, 20)] if evaluation else []
    return History(tuple(points), tuple(evaluations), 4.0, 4.0)


def falling(to: float, pace: float = 8.0) -> Callable[[float], float]:
    return lambda share: to + (3.6 - to) * math.exp(-pace * share)


SHAPES = {
    "settles low": (curve(falling(0.15), accuracy=lambda s: 0.95 * s**0.05, evaluation=falling(0.2)), pb.VERDICT_GOOD),
    "settles at 0.4": (curve(falling(0.4), evaluation=falling(0.45)), pb.VERDICT_FAIR),
    "ends at 0.7": (curve(falling(0.7), evaluation=falling(0.8)), pb.VERDICT_UNDERTRAINED),
    "accuracy of 0.73": (curve(falling(0.2), accuracy=lambda s: 0.73), pb.VERDICT_UNDERTRAINED),
    "evaluation turns": (
        curve(falling(0.1), evaluation=lambda s: 1.0 + (s - 0.3) ** 2 * 3),
        pb.VERDICT_OVERFIT,
    ),
    "climbs": (curve(lambda s: 2.0 + 3 * max(0, s - 0.5)), pb.VERDICT_DIVERGED),
    "not a number": (curve(lambda s: math.nan if s > 0.5 else 2.0), pb.VERDICT_DIVERGED),
    "infinite": (curve(lambda s: math.inf if s > 0.9 else 2.0), pb.VERDICT_DIVERGED),
    "flat": (curve(lambda s: 3.2, noise=0.005), pb.VERDICT_NO_SIGNAL),
    "zero throughout": (curve(lambda s: 0.0), pb.VERDICT_DATA_BUG),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_gets_its_verdict(name: str) -> None:
    history, expected = SHAPES[name]
    judgement = judge(history)
    assert pb.Verdict.Name(judgement.verdict) == pb.Verdict.Name(expected), [sign.message for sign in judgement.signs]
    if expected != pb.VERDICT_GOOD:
        failed = [sign for sign in judgement.signs if sign.verdict == expected and not sign.passed]
        assert failed and all(sign.remedy for sign in failed)


def test_noise_alone_changes_no_verdict() -> None:
    for noise in (0.0, 0.05, 0.15):
        assert judge(curve(falling(0.15), evaluation=falling(0.2), noise=noise)).verdict == pb.VERDICT_GOOD


def scattered(loss: Callable[[float], float], steps: int, deviation: float, seed: int) -> History:
    """Return a short run whose steps scatter, as those of small batches do."""
    draw = random.Random(seed)
    values = [max(0.01, loss(step / steps) + draw.gauss(0, deviation)) for step in range(1, steps + 1)]
    return History(tuple(Point(step, value, None, 1e-4, 1.0) for step, value in enumerate(values, start=1)))


@pytest.mark.parametrize("steps", [12, 20, 40, 100])
def test_a_short_run_that_scatters_has_not_diverged(steps: int) -> None:
    """One in a hundred at most is taken for a rise, and one that climbs is told from noise when steps are enough."""
    settled = [scattered(lambda share: 0.8 + 2.4 * math.exp(-8 * share), steps, 0.3, seed) for seed in range(300)]
    assert sum(judge(history).verdict == pb.VERDICT_DIVERGED for history in settled) <= 3
    climbs = [
        scattered(lambda share: 2.0 - 2.4 * share if share < 0.5 else 0.8 + 4 * (share - 0.5), steps, 0.3, seed)
        for seed in range(300)
    ]
    assert sum(judge(history).verdict == pb.VERDICT_DIVERGED for history in climbs) >= (285 if steps >= 40 else 100)


@pytest.mark.parametrize(
    ("loss", "band"),
    [(0.05, "excellent"), (0.1, "good"), (0.3, "good"), (0.31, "fair"), (0.5, "fair"), (0.51, "insufficient")],
)
def test_bands_of_the_loss(loss: float, band: str) -> None:
    assert loss_band(loss) == band


@pytest.mark.parametrize(
    ("accuracy", "band"), [(0.96, "excellent"), (0.95, "good"), (0.9, "good"), (0.85, "fair"), (0.79, "insufficient")]
)
def test_bands_of_the_accuracy(accuracy: float, band: str) -> None:
    assert accuracy_band(accuracy) == band


def test_what_is_known_of_the_data_counts() -> None:
    good = SHAPES["settles low"][0]
    assert judge(good, Facts(rows=800, rows_teaching_eos=0)).verdict == pb.VERDICT_DATA_BUG
    assert judge(good, Facts(trained_tokens=0)).verdict == pb.VERDICT_DATA_BUG
    few = judge(good, Facts(rows=450, rows_teaching_eos=450))
    assert few.verdict == pb.VERDICT_GOOD
    assert "FEW_ROWS" in {sign.code for sign in few.signs if not sign.passed}


def test_a_run_that_began_again_is_found_within_a_log_and_between_runs() -> None:
    first = SHAPES["settles at 0.4"][0]
    again = [Point(point.step + STEPS, point.loss) for point in first.points]
    joined = judge(History((*first.points, *again)))
    assert [sign for sign in joined.signs if sign.code == "RESTARTED" and "step 201" in sign.message]
    later = judge(first, Facts(earlier=[first]))
    assert "STARTED_ANEW" in {sign.code for sign in later.signs}
    resumed = judge(first, Facts(earlier=[first], resumed_from="checkpoint-200"))
    assert "STARTED_ANEW" not in {sign.code for sign in resumed.signs}


@pytest.mark.parametrize("name", SHAPES)
def test_every_patch_is_one_that_a_run_accepts(name: str) -> None:
    history, verdict = SHAPES[name]
    now = resolve(pb.TrainRequest()).parameters
    patch = config_patch(judge(history), history, now)
    assert bool(patch) == (verdict not in (pb.VERDICT_GOOD, pb.VERDICT_DATA_BUG))
    changed = pb.TrainingParameters()
    changed.CopyFrom(now)
    json_format.ParseDict(patch, changed)
    training_spec(pb.TrainRequest(name="next", parameters=changed))
    assert not patch or changed != now


def state(entries: list[dict[str, Any]], **more: Any) -> bytes:
    return json.dumps({"log_history": entries, "epoch": 3.0, "num_train_epochs": 3, **more}).encode()


def test_a_trainer_state_of_others_is_read() -> None:
    entries: list[dict[str, Any]] = [
        {"step": 10 * number, "loss": 3.0 / number, "learning_rate": 1e-4, "mean_token_accuracy": 0.5}
        for number in range(1, 30)
    ]
    entries.insert(5, {"step": 50, "eval_loss": 0.9})
    entries.append({"step": 300, "train_runtime": 12.0, "train_loss": 0.5})
    history = from_trainer_state(state(entries))
    assert len(history.points) == 29
    assert history.evaluations == ((50, 0.9),)
    assert history.points[0] == Point(10, 3.0, 0.5, 1e-4, 0.0)
    # transformers writes NaN as JSON does not know it.
    assert math.isnan(from_trainer_state(b'{"log_history": [{"step": 1, "loss": NaN}]}').points[0].loss)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "no list log_history"),
        (b'{"log_history": {}}', "no list log_history"),
        (b'{"log_history": []}', "no entry with a loss"),
        (b'{"log_history": [1, null, {"loss": "x"}, {"loss": true}]}', "no entry with a loss"),
    ],
)
def test_what_is_no_trainer_state_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(LoralineError) as caught:
        from_file(content)
    assert caught.value.reason == "NOT_A_TRAINER_STATE"
    assert said in caught.value.message


def test_one_logged_step_is_enough_for_an_answer() -> None:
    answer = diagnose(from_file(state([{"step": 1, "loss": 0.2}])))
    assert answer.verdict == pb.VERDICT_GOOD
    assert answer.html.count("<circle") >= 1


@pytest.mark.parametrize("name", SHAPES)
def test_the_page_stands_alone(name: str) -> None:
    history = SHAPES[name][0]
    hostile = "<script>alert(1)</script>"
    answer = diagnose(Subject(hostile, history, Facts(), resolve(pb.TrainRequest()).parameters))
    assert hostile not in answer.html
    assert "<script" not in answer.html
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", answer.html)
    assert "nan" not in re.findall(r'points="([^"]*)"', answer.html).__str__()
    assert len(answer.loss_curve) == STEPS
    assert {reason.code for reason in answer.reasons} >= {"NO_EVALUATION"} or history.evaluations


def test_a_run_that_ended_in_nan_is_told_one_thing_only() -> None:
    """No figure is made of a loss that is none, and no second advice contradicts the first."""
    judgement = judge(SHAPES["not a number"][0])
    failed = [sign for sign in judgement.signs if not sign.passed]
    assert {sign.code for sign in failed} == {"LOSS_NOT_FINITE", "NO_EVALUATION"}
    assert not any("nan" in sign.message for sign in judgement.signs)
    # The chart goes on to the last step, though there is nothing to draw there.
    answer = diagnose(Subject("x", SHAPES["not a number"][0], Facts(), resolve(pb.TrainRequest()).parameters))
    assert f">{STEPS}</text>" in answer.html


def test_gradients_that_leap_are_told() -> None:
    calm = SHAPES["settles low"][0]
    points = [replace(point, grad_norm=40.0) if point.step in (90, 150) else point for point in calm.points]
    found = {sign.code: sign for sign in judge(replace(calm, points=tuple(points))).signs}
    assert "at 2 steps" in found["GRADIENT_SPIKES"].message and "40" in found["GRADIENT_SPIKES"].message
    assert "GRADIENT_SPIKES" not in {sign.code for sign in judge(calm).signs}


def test_a_loss_that_jumps_about_at_the_end_is_told_with_its_remedy() -> None:
    """The last fifth alternates; the same mean without jumps is steady."""
    came_down = falling(0.15)

    def ends(low: float, high: float) -> History:
        return curve(lambda s: came_down(s) if s <= 0.8 else (low, high)[round(s * STEPS) % 2], noise=0.0)

    found = {sign.code: sign for sign in judge(ends(0.05, 1.0)).signs}
    said = found["UNSTEADY"]
    assert not said.passed and "STEADY" not in found
    assert "0.525 on average, standard deviation 0.475" in said.message
    assert said.remedy == "Raise batch_size or grad_accum, or lower learning_rate to a half."
    calm = {sign.code: sign for sign in judge(ends(0.525, 0.525)).signs}
    assert calm["STEADY"].passed and "UNSTEADY" not in calm


def test_training_and_evaluation_that_both_stay_high_are_underfit() -> None:
    high = curve(falling(1.5), evaluation=falling(1.5))
    judgement = judge(high)
    said = next(sign for sign in judgement.signs if sign.code == "UNDERFIT")
    assert (judgement.verdict, said.verdict, said.passed) == (pb.VERDICT_UNDERTRAINED, pb.VERDICT_UNDERTRAINED, False)
    assert "both high" in said.message and "larger base" in said.remedy
    # One of the two alone is another matter: rows that are hard to foretell, or rows learned by heart.
    for train, evaluation in ((0.2, 1.5), (1.5, 0.8)):
        other = judge(curve(falling(train), evaluation=falling(evaluation)))
        assert "UNDERFIT" not in {sign.code for sign in other.signs}


def test_a_loss_that_settled_too_high_wants_room_and_then_a_larger_base() -> None:
    high = curve(falling(0.8, pace=30.0), evaluation=falling(0.8, pace=30.0))
    judgement = judge(high, Facts(rank=16))
    said = next(sign for sign in judgement.signs if sign.code == "FINAL_LOSS")
    assert "lora.r (16 now), then take a larger base" in said.remedy
    patch = config_patch(judgement, high, resolve(pb.TrainRequest()).parameters)
    assert patch["lora"] == {"r": 32, "alpha": 64.0}


SAMPLES = [
    pb.SampleAnswers(
        prompt="누구세요?", origin="on_topic", step=9, base="tide <b>", adapter="Aye 潮声 🙂", reference="Aye"
    ),
    pb.SampleAnswers(prompt="Who?", origin="asked", step=9, base="the the", adapter="the the"),
]


def test_checklists_before_during_and_after_with_answers_side_by_side() -> None:
    facts = Facts(rows=800, rows_teaching_eos=800, rows_cut=2, samples=SAMPLES, probe_shift=2.5, rank=16)
    answer = diagnose(Subject("Run x", SHAPES["settles low"][0], facts, resolve(pb.TrainRequest()).parameters))
    phases = {reason.code: reason.phase for reason in answer.reasons}
    assert phases["ROWS_CUT"] == phases["EOS_TAUGHT"] == phases["ROWS"] == pb.RUN_PHASE_BEFORE
    assert phases["STEADY"] == pb.RUN_PHASE_DURING
    assert phases["FINAL_LOSS"] == phases["PROBES_MOVED"] == phases["ANSWERS_CHANGED"] == pb.RUN_PHASE_AFTER
    assert [reason.code for reason in answer.reasons if not reason.passed] == ["ROWS_CUT"]
    assert list(answer.samples) == SAMPLES
    for words in (
        "Before: data",
        "During: the course",
        "After: what came out",
        "누구세요?",
        "tide &lt;b&gt;",
        "Aye 潮声 🙂",
    ):
        assert words in answer.html


def test_an_adapter_that_changed_nothing_gave_no_signal() -> None:
    good = SHAPES["settles low"][0]
    same = [pb.SampleAnswers(prompt="Who?", base="the the", adapter="the the")]
    judgement = judge(good, Facts(samples=same, probe_shift=0.001))
    assert judgement.verdict == pb.VERDICT_NO_SIGNAL
    assert {"ANSWERS_UNCHANGED", "PROBES_UNMOVED"} <= {sign.code for sign in judgement.signs if not sign.passed}


def test_every_sign_is_on_a_checklist() -> None:
    source = "".join((Path(diagnosis.__file__).parent / name).read_text() for name in ("signs.py", "run_signs.py"))
    codes = set(re.findall(r'Sign\(\s*"([A-Z_]+)"', source))
    assert codes == set(PHASES)


def test_the_patch_is_shown_as_a_pipeline_file_says_it() -> None:
    shown = as_pipeline({"epochs": 4.0, "lora": {"r": 32, "alpha": 64.0}})
    assert shown == "train:\n  training_params:\n    epochs: 4\n    lora_r: 32\n    lora_alpha: 64"


def test_advice_does_not_contradict_itself() -> None:
    """An overfit run whose training loss is still high is not told to train longer."""
    history = curve(falling(1.5), evaluation=lambda share: 5.0 + share)
    judgement = judge(history)
    assert judgement.verdict == pb.VERDICT_OVERFIT
    remedies = " ".join(sign.remedy for sign in judgement.signs if not sign.passed)
    assert "Go on training" not in remedies and "Continue the run" not in remedies
