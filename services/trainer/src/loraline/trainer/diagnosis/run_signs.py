"""What the data and the results say of a run, besides its curve; a function a sign. None where nothing is known."""

from __future__ import annotations

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.diagnosis.history import History
from loraline.trainer.diagnosis.sign import Facts, Sign

_ADVISED_ROWS = 500
_SHIFT = 0.05
"""Nats; below it, base and adapter differ by no more than kernels do."""
_PREFERS, _LEARNS = 0.8, 0.6
"""Shares of pairs: told apart well enough, and told apart at all; half is chance."""
_SAME_TOKENS, _SAME_SHARE = 16, 0.3
"""Tokens that all rows begin with, and their share of all tokens, above which they are more than a template's own."""


def end_not_taught(history: History, facts: Facts) -> Sign | None:
    """No row teaches the end of an answer."""
    if facts.rows_teaching_eos is None or not facts.rows:
        return None
    if facts.rows_teaching_eos == 0:
        text = "No row teaches the end-of-sequence token: the model will not stop."
        remedy = "Take a chat template that ends assistant turns, or raise max_length so that ends are not cut off."
        return Sign("EOS_NEVER_TAUGHT", False, text, remedy, pb.VERDICT_DATA_BUG, grave=True)
    return Sign("EOS_TAUGHT", True, f"{facts.rows_teaching_eos} of {facts.rows} rows teach the end of an answer.")


def length_losses(history: History, facts: Facts) -> Sign | None:
    """Rows that were cut or left out for their length."""
    if facts.rows_cut is None or not facts.rows:
        return None
    if not facts.rows_cut:
        return Sign("NOTHING_CUT", True, "No row was cut or left out for its length.")
    text = f"{facts.rows_cut} rows were cut or left out for their length; {facts.rows} were trained on."
    return Sign("ROWS_CUT", False, text, "Raise max_length, or set length_policy LENGTH_POLICY_SPLIT.")


def answers(history: History, facts: Facts) -> Sign | None:
    """Whether the adapter answers otherwise than the base did."""
    if not facts.samples:
        return None
    changed = sum(sample.base != sample.adapter for sample in facts.samples)
    if changed:
        return Sign(
            "ANSWERS_CHANGED", True, f"{changed} of {len(facts.samples)} sample answers differ from the base's."
        )
    text = f"Base and adapter give the same {len(facts.samples)} sample answers: nothing that was learned shows."
    return Sign("ANSWERS_UNCHANGED", False, text, "Raise learning_rate or epochs, and look at the samples' prompts.")


def probes(history: History, facts: Facts) -> Sign | None:
    """Whether the adapter moved the probes at all."""
    if facts.probe_shift is None:
        return None
    if facts.probe_shift > _SHIFT:
        return Sign("PROBES_MOVED", True, f"The adapter moves probes by up to {facts.probe_shift:.2f} nats.")
    text = f"The adapter moves no probe by more than {facts.probe_shift:.3f} nats: it is the base still."
    return Sign("PROBES_UNMOVED", False, text, "Raise learning_rate tenfold.", pb.VERDICT_NO_SIGNAL, grave=True)


def few_rows(history: History, facts: Facts) -> Sign | None:
    """Too little data."""
    # A result of an earlier release counts repetitions alone.
    rows = facts.unique_rows or facts.rows
    if not rows:
        return None
    if rows >= _ADVISED_ROWS:
        return Sign("ROWS", True, f"There are {rows} rows.")
    text = f"There are {rows} rows; {_ADVISED_ROWS} to 1000 or more make a character that answers to the point."
    return Sign("FEW_ROWS", False, text, "Add rows (loraline run with a generate stage), varied in prompts.")


def repeated_prompt(history: History, facts: Facts) -> Sign | None:
    """A system prompt that every row repeats."""
    rows = {tuple(row.token_ids) for row in facts.first_batch}
    if len(rows) < 3:
        return None
    same = next((at for at, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), min(map(len, rows)))
    share = same * len(rows) / sum(map(len, rows))
    if same < _SAME_TOKENS or share < _SAME_SHARE:
        return Sign("PROMPTS_VARY", True, "The rows shown first do not repeat one long system prompt.")
    text = f"All rows shown first begin with the same {same} tokens, {share:.0%} of what is computed: a system prompt."
    remedy = "Shorten it, or leave it out of most rows; what stays in them must be sent with every question later."
    return Sign("PROMPT_REPEATED", False, text, remedy)


def files(history: History, facts: Facts) -> Sign | None:
    """Whether everything that a finished run should leave is there."""
    if facts.published is None:
        return None
    if facts.missing:
        text = f"The run has ended, and its result lacks {', '.join(facts.missing)}."
        return Sign("FILES_MISSING", False, text, "Run it again with existing_run CONTINUE.")
    text = f"{facts.published} is published whole, with its token receipt and its probes."
    return Sign("FILES_COMPLETE", True, text)


def preferences(history: History, facts: Facts) -> Sign | None:
    """Whether the chosen answers have come to be preferred."""
    share = facts.reward_accuracy
    if share is None:
        return None
    text = f"The chosen answer has the greater reward in {share:.0%} of the pairs; half is chance."
    if share >= _PREFERS:
        return Sign("REWARD_ACCURACY", True, text)
    verdict = pb.VERDICT_FAIR if share >= _LEARNS else pb.VERDICT_UNDERTRAINED
    remedy = "Train longer or with a higher learning_rate, and look whether chosen and rejected really differ in kind."
    return Sign("REWARD_ACCURACY", False, text, remedy, verdict)
