"""What can be seen in a loss curve, a function a sign. Each returns None when the curve says nothing about it."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.diagnosis.bands import accuracy_band, loss_band
from loraline.trainer.diagnosis.history import History, mean_accuracy, mean_loss, smoothed
from loraline.trainer.diagnosis.sign import Facts, Sign

_ENOUGH_POINTS = 10
"""Fewer logged steps than this show no trend."""
_RISE = 1.1
"""A loss that ends a tenth above its lowest stretch, or an evaluation loss 5 % above its lowest, has turned."""
_EVALUATION_RISE = 1.05
_BEYOND_NOISE = 4.0
"""Standard errors by which a rise must exceed the scatter from step to step: the lowest of ten stretches of noise alone
lies up to three below the last."""
_MORE_DATA = "The evaluation loss has turned, so that more steps only teach these rows by heart: add rows first."


def not_a_number(history: History, facts: Facts) -> Sign | None:
    """NaN or infinite loss."""
    bad = next((point for point in history.points if not math.isfinite(point.loss)), None)
    if bad is None:
        return None
    remedy = "Lower learning_rate to a third, raise warmup_ratio to 0.1; with fp16 take bf16 or fp32."
    message = f"The loss is not a number from step {bad.step} on."
    return Sign("LOSS_NOT_FINITE", False, message, remedy, pb.VERDICT_DIVERGED, grave=True)


def rising(history: History, facts: Facts) -> Sign | None:
    """The loss ends well above where it was."""
    if not _has_trend(history):
        return None
    # Stretches as long as the tail: the mean of fewer steps is lower somewhere by chance alone.
    bins = smoothed(history.points, 10)
    lowest, last = min(bins), mean_loss(history.tail)
    if not math.isfinite(last):
        return None
    # A converged run hovers; near zero a tenth is nothing, so that the rise must count in nats too.
    if last <= lowest * _RISE or last - lowest < max(0.1, _BEYOND_NOISE * _noise_of_tail(history)):
        return None
    if last < bins[0] * 0.5:
        return None
    message = f"The loss ends at {last:.3f}, after having been {lowest:.3f}."
    remedy = "Lower learning_rate to a third and raise warmup_ratio to 0.1."
    return Sign("LOSS_RISES", False, message, remedy, pb.VERDICT_DIVERGED, grave=True)


def _noise_of_tail(history: History) -> float:
    """Return the standard error of the difference of two tails' means, in nats, from how neighbouring steps differ.

    The differences of neighbours leave a trend out; half their variance is a single step's (von Neumann).
    """
    losses = [point.loss for point in history.points if math.isfinite(point.loss)]
    steps = [after - before for before, after in pairwise(losses)]
    of_a_step = statistics.median(abs(step) for step in steps) / (0.6745 * math.sqrt(2)) if steps else 0.0
    return of_a_step * math.sqrt(2 / len(history.tail))


def nothing_to_learn(history: History, facts: Facts) -> Sign | None:
    """A loss of zero from the start, or no token that carries loss."""
    if facts.trained_tokens == 0:
        text = "No token carries loss: every response was masked or cut off."
        remedy = "Look at the token receipt (loraline artifacts show) and raise max_length."
        return Sign("NO_TRAINED_TOKENS", False, text, remedy, pb.VERDICT_DATA_BUG, grave=True)
    first = mean_loss(history.head)
    if not math.isfinite(first) or first >= 0.01:
        return None
    message = f"The loss is {first:.4f} from the first steps on: there is nothing to learn in what carries loss."
    remedy = "Check that responses are not empty, not masked and not cut off by max_length."
    return Sign("LOSS_ZERO_FROM_START", False, message, remedy, pb.VERDICT_DATA_BUG, grave=True)


def flat(history: History, facts: Facts) -> Sign | None:
    """The loss does not move."""
    if not _has_trend(history):
        return None
    first, last = mean_loss(history.head), mean_loss(history.tail)
    if not math.isfinite(last) or first < 0.3 or abs(first - last) > 0.02 * first:
        return None
    message = f"The loss does not move: {first:.3f} at the start, {last:.3f} at the end."
    if all(point.grad_norm == 0 for point in history.points) and any(point.learning_rate for point in history.points):
        message += " The gradient is zero throughout: no weight is trained."
    remedy = "Raise learning_rate tenfold, check that target_modules names layers of this base."
    return Sign("LOSS_FLAT", False, message, remedy, pb.VERDICT_NO_SIGNAL, grave=True)


def overfit(history: History, facts: Facts) -> Sign | None:
    """The evaluation loss has turned while the training loss still falls."""
    if len(history.evaluations) < 2:
        return None
    best_step, best = min(history.evaluations, key=lambda entry: entry[1])
    last_step, last = history.evaluations[-1]
    then = [point.loss for point in history.points if point.step <= best_step]
    if last <= best * _EVALUATION_RISE or last_step == best_step or not then:
        return None
    if mean_loss(history.tail) >= statistics.fmean(then[-max(1, len(then) // 10) :]):
        return None
    message = (
        f"The evaluation loss was lowest ({best:.3f}) at step {best_step} and ends at {last:.3f}, while the training "
        f"loss fell to {mean_loss(history.tail):.3f}: the rows are learned by heart."
    )
    remedy = "Train for fewer epochs, add rows, or set dropout 0.05; a character may well know its lines by heart."
    return Sign("EVAL_LOSS_RISES", False, message, remedy, pb.VERDICT_OVERFIT)


def evaluation(history: History, facts: Facts) -> Sign | None:
    """What the evaluation loss says when it has not turned."""
    if not history.evaluations:
        text = "There is no evaluation loss, so that overfitting cannot be seen."
        return Sign("NO_EVALUATION", False, text, "Give validation rows or set validation_fraction 0.05.")
    last, train = history.evaluations[-1][1], mean_loss(history.tail)
    if last > 1.0 and train > 1.0 and last < train * 2:
        text = f"Evaluation loss {last:.3f} and training loss {train:.3f} are both high."
        return Sign(
            "UNDERFIT", False, text, "Train longer, with a higher rank or a larger base.", pb.VERDICT_UNDERTRAINED
        )
    if overfit(history, facts):
        return None
    return Sign("EVAL_LOSS", True, f"The evaluation loss ends at {last:.3f}.")


def loss_level(history: History, facts: Facts) -> Sign | None:
    """The band of the final loss."""
    loss = mean_loss(history.tail)
    if not math.isfinite(loss):
        return None
    band = loss_band(loss)
    message = f"The final loss is {loss:.3f} nats per token: {band}."
    if band in ("excellent", "good"):
        return Sign("FINAL_LOSS", True, message)
    verdict = pb.VERDICT_FAIR if band == "fair" else pb.VERDICT_UNDERTRAINED
    remedy = "Go on training until it is between 0.1 and 0.3; continue the run instead of starting anew."
    settled = still_falling(history, facts)
    if settled is not None and settled.passed:
        remedy = "It has settled there: raise lora.r"
        remedy += f" ({facts.rank} now), then take a larger base." if facts.rank else ", then take a larger base."
    remedy = _MORE_DATA if overfit(history, facts) else remedy
    return Sign("FINAL_LOSS", False, message, remedy, verdict)


def accuracy_level(history: History, facts: Facts) -> Sign | None:
    """The band of the final token accuracy."""
    accuracy = mean_accuracy(history.tail)
    if accuracy is None:
        return None
    band = accuracy_band(accuracy)
    message = f"The final token accuracy is {accuracy:.3f}: {band}."
    if band in ("excellent", "good"):
        return Sign("TOKEN_ACCURACY", True, message)
    verdict = pb.VERDICT_FAIR if band == "fair" else pb.VERDICT_UNDERTRAINED
    remedy = _MORE_DATA if overfit(history, facts) else "Go on training until it is above 0.9."
    return Sign("TOKEN_ACCURACY", False, message, remedy, verdict)


def still_falling(history: History, facts: Facts) -> Sign | None:
    """The loss was still falling when the run ended."""
    if not _has_trend(history):
        return None
    bins = smoothed(history.points, 10)
    if not all(map(math.isfinite, bins)) or len(bins) < 4 or bins[-1] < 0.1:
        return None
    fall = (bins[-4] - bins[-1]) / bins[-4] if bins[-4] else 0.0
    if fall < 0.1:
        return Sign("SETTLED", True, "The loss has settled.")
    message = f"The loss fell by {fall:.0%} over the last third: it had not settled."
    remedy = _MORE_DATA if overfit(history, facts) else "Continue the run for more epochs."
    return Sign("STILL_FALLING", False, message, remedy)


def unsteady(history: History, facts: Facts) -> Sign | None:
    """The loss jumps about at the end."""
    if not _has_trend(history):
        return None
    tail = [point.loss for point in history.points[-max(5, len(history.points) // 5) :]]
    if not all(map(math.isfinite, tail)):
        return None
    mean, deviation = statistics.fmean(tail), statistics.pstdev(tail)
    if mean > 0.05 and deviation > 0.6 * mean:
        message = f"The loss jumps about at the end: {mean:.3f} on average, standard deviation {deviation:.3f}."
        remedy = "Raise batch_size or grad_accum, or lower learning_rate to a half."
        return Sign("UNSTEADY", False, message, remedy)
    return Sign("STEADY", True, f"The loss is steady at the end: standard deviation {deviation:.3f}.")


def started_anew(history: History, facts: Facts) -> Sign | None:
    """Training began again from the start although an earlier state was there."""
    again = _restart_within(history)
    if again is not None:
        text = f"At step {again} the loss is back where it was at the first step: the state was not restored."
        remedy = "Continue from the last checkpoint (existing_run CONTINUE), with weights, optimizer and schedule."
        return Sign("RESTARTED", False, text, remedy)
    first = mean_loss(history.head)
    for other in facts.earlier:
        begin, end = mean_loss(other.head), mean_loss(other.tail)
        if not facts.resumed_from and end < 0.7 * begin and abs(first - begin) < 0.1 * begin:
            text = (
                f"The run starts at {first:.3f}, as an earlier run of its name did, which had come down to {end:.3f}."
            )
            remedy = "If it should have gone on from there, start it with existing_run CONTINUE."
            return Sign("STARTED_ANEW", False, text, remedy)
    if facts.resumed_from:
        return Sign("CONTINUED", True, f"The run went on from {facts.resumed_from} and did not begin anew.")
    return None


def spikes(history: History, facts: Facts) -> Sign | None:
    """The gradient norm leaps far above its usual size: single batches throw the run about."""
    norms = [point.grad_norm for point in history.points if point.grad_norm > 0 and math.isfinite(point.grad_norm)]
    if len(norms) < _ENOUGH_POINTS:
        return None
    usual = statistics.median(norms)
    # The first steps after a fresh start are steep as a rule.
    late = norms[len(norms) // 10 :]
    leaps = sum(norm > 10 * usual for norm in late)
    if not leaps:
        return None
    message = (
        f"The gradient norm leaps above ten times its median ({usual:.2g}) at {leaps} steps; greatest {max(late):.2g}."
    )
    return Sign("GRADIENT_SPIKES", False, message, "Set max_grad_norm 0.3, raise grad_accum, or look at long rows.")


def _restart_within(history: History) -> int | None:
    """Return the step where the loss jumped back to its first level after having halved; None if it never did."""
    first = mean_loss(history.head)
    lowest = first
    for number, point in enumerate(history.points):
        lowest = min(lowest, mean_loss(history.points[max(0, number - 4) : number + 1]))
        following = history.points[number : number + 3]
        if lowest < 0.5 * first and len(following) == 3 and min(one.loss for one in following) > 0.9 * first:
            return point.step
    return None


def _has_trend(history: History) -> bool:
    return len(history.points) >= _ENOUGH_POINTS
