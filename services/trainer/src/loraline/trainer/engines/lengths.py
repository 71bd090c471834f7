"""What happens to rows that are longer than the run allows: refused, cut, left out, or split at turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loraline.core.errors import failed_precondition
from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow, MaskNotProven, Messages
from loraline.trainer.rows import rows_error


@dataclass(frozen=True)
class LengthRule:
    """What happens to long rows."""

    max_length: int
    """Longest row in tokens."""
    policy: str = "error"
    """`error`, `truncate`, `drop` or `split`."""
    max_truncated_share: float = 0.1
    """Share of rows that may be cut under `truncate`."""


Pieces = dict[str, list[EncodedRow]]
"""What is left of each row, by its source; a row that was left out is missing."""


def apply_lengths(encoded: dict[str, EncodedRow], rule: LengthRule, encoder: ChatEncoder) -> Pieces:
    """Return what the rule leaves of each row.

    Raises INVALID_ARGUMENT (ROWS_TOO_LONG) with the rows' numbers, or FAILED_PRECONDITION (TOO_MANY_TRUNCATED).
    """
    long = {source: row for source, row in encoded.items() if len(row.input_ids) > rule.max_length}
    left: Pieces = {source: [row] for source, row in encoded.items() if source not in long}
    if not long or rule.policy == "drop":
        return left
    if rule.policy == "error":
        problems = {source: f"has {len(row.input_ids)} tokens" for source, row in long.items()}
        what = (
            f"are longer than max_length {rule.max_length}; raise parameters.max_length, or choose length_policy "
            "truncate, drop or split"
        )
        raise rows_error("ROWS_TOO_LONG", what, problems)
    changed = _split(long, rule, encoder) if rule.policy == "split" else _cut(long, len(encoded), rule)
    # In the order of the rows, so that the receipt shows the same ones whatever the rule.
    return {source: changed.get(source) or left[source] for source in encoded}


def _cut(long: dict[str, EncodedRow], rows: int, rule: LengthRule) -> Pieces:
    share = len(long) / rows
    if share > rule.max_truncated_share:
        message = (
            f"{len(long)} of {rows} rows ({share:.0%}) would be cut at max_length {rule.max_length}; at most "
            f"{rule.max_truncated_share:.0%} may. Raise parameters.max_length or parameters.max_truncated_share."
        )
        raise failed_precondition("TOO_MANY_TRUNCATED", message, rows=str(len(long)))
    size = rule.max_length
    return {
        source: [replace(row, input_ids=row.input_ids[:size], mask=row.mask[:size], truncated=True)]
        for source, row in long.items()
    }


def _split(long: dict[str, EncodedRow], rule: LengthRule, encoder: ChatEncoder) -> Pieces:
    """Split between exchanges; each piece begins with the row's system messages and ends with an answer."""
    pieces: Pieces = {}
    problems: dict[str, str] = {}
    for source, row in long.items():
        system, exchanges = exchanges_of(row.messages)
        parts = list(_grouped(system, exchanges, rule.max_length, encoder))
        try:
            encoded = [encoder.encode(f"{source}#{number}", part) for number, part in enumerate(parts, start=1)]
        except MaskNotProven as error:
            raise rows_error("MASK_NOT_PROVEN", "cannot be masked once it is split", {source: str(error)}) from error
        longest = max(len(piece.input_ids) for piece in encoded)
        if longest > rule.max_length:
            problems[source] = f"has one exchange with {longest} tokens"
        pieces[source] = encoded
    if problems:
        what = (
            f"cannot be split to max_length {rule.max_length}, because a single question with its answer is longer; "
            "raise parameters.max_length, shorten the system message, or choose length_policy truncate or drop"
        )
        raise rows_error("ROWS_TOO_LONG", what, problems)
    return pieces


def exchanges_of(messages: Messages) -> tuple[Messages, list[Messages]]:
    """Return the leading system messages, and the rest in parts that end with the assistant's last word in a row.

    Words after the last answer belong to no exchange: nothing of them is learned.
    """
    begin = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[Messages] = []
    current: Messages = []
    for at, message in enumerate(messages[begin:], start=begin):
        current.append(message)
        following = messages[at + 1]["role"] if at + 1 < len(messages) else "user"
        if message["role"] == "assistant" and following not in ("assistant", "tool"):
            exchanges.append(current)
            current = []
    return messages[:begin], exchanges


def _grouped(system: Messages, exchanges: list[Messages], limit: int, encoder: ChatEncoder) -> Iterator[Messages]:
    """Yield as many exchanges at a time as fit."""
    current: Messages = []
    for exchange in exchanges:
        if current and len(encoder.render([*system, *current, *exchange])) > limit:
            yield [*system, *current]
            current = []
        current = [*current, *exchange]
    yield [*system, *current]
