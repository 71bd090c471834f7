"""From preference pairs to what DPO trains on, with a token receipt for each side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow
from loraline.trainer.engines.lengths import LengthRule, Pieces, apply_lengths
from loraline.trainer.engines.preparing import (
    PreparedData,
    all_rows_dropped,
    encode_unique,
    eos_not_learned,
    receipt_of,
    refuse_control_tokens,
    refuse_fully_masked,
)
from loraline.trainer.rows import Mixture, Row, rows_error


@dataclass(frozen=True)
class _Sides:
    """What the length rule left of pairs: of each side, rows by their source. Both have the same sources."""

    chosen: Pieces
    rejected: Pieces


def prepare_pairs(
    mixture: Mixture, encoder: ChatEncoder, rule: LengthRule, *, allow_unlearned_eos: bool
) -> PreparedData:
    """Encode both answers of every pair and make both receipts; a pair whose one side is left out is left out whole.

    Only the last answer carries loss; earlier answers belong to the prompt. Raises as `prepare` does, and
    INVALID_ARGUMENT (MASK_NOT_PROVEN) where the two sides do not render to one prompt.
    """
    rejected = replace(mixture, train=_other_side(mixture.train), validation=_other_side(mixture.validation))
    for side in (mixture, rejected):
        refuse_control_tokens([*side.train, *side.validation], encoder)
    kept = _encode(mixture.train, rejected.train, encoder, rule)
    train = [pair for row in mixture.train for pair in _pairs(kept, row.source)]
    if not train:
        raise all_rows_dropped(rule)
    refuse_fully_masked(kept.chosen)
    refuse_fully_masked(kept.rejected)
    held_out = _encode(mixture.validation, rejected.validation, encoder, replace(rule, policy="drop"))
    validation = [pair for source in held_out.chosen for pair in _pairs(held_out, source)]
    receipt = receipt_of(mixture, encoder, train, kept.chosen, held_out.chosen)
    if receipt.counts.rows_teaching_eos == 0 and not allow_unlearned_eos:
        raise eos_not_learned(encoder)
    worse = [pair.rejected for pair in train if pair.rejected is not None]
    other = receipt_of(rejected, encoder, worse, kept.rejected, held_out.rejected)
    return PreparedData(train, validation, receipt, other, max_length=rule.max_length)


def _other_side(rows: Sequence[Row]) -> list[Row]:
    return [Row(row.source, row.rejected) for row in rows if row.rejected is not None]


def _encode(better: Sequence[Row], worse: Sequence[Row], encoder: ChatEncoder, rule: LengthRule) -> _Sides:
    chosen, rejected = ({source: _last_answer(row) for source, row in encode_unique(rows, encoder).items()}
                        for rows in (better, worse))  # fmt: skip
    apart = {
        source: "renders another prompt before chosen than before rejected"
        for source, row in chosen.items()
        if _prompt(row) != _prompt(rejected[source])
    }
    if apart:
        raise rows_error("MASK_NOT_PROVEN", "cannot be compared", apart)
    found = _Sides(apply_lengths(chosen, rule, encoder), apply_lengths(rejected, rule, encoder))
    both = found.chosen.keys() & found.rejected.keys()
    return _Sides(*({source: pieces[source] for source in pieces if source in both}
                    for pieces in (found.chosen, found.rejected)))  # fmt: skip


def _last_answer(row: EncodedRow) -> EncodedRow:
    """Return the row with loss on its last answer alone."""
    end = len(row.mask) - row.mask[::-1].index(1)
    begin = next((at + 1 for at in range(end - 1, -1, -1) if not row.mask[at]), 0)
    return replace(row, mask=[int(begin <= at < end) for at in range(len(row.mask))])


def _prompt(row: EncodedRow) -> list[int]:
    return row.input_ids[: row.mask.index(1)]


def _pairs(sides: _Sides, source: str) -> list[EncodedRow]:
    found = zip(sides.chosen.get(source, ()), sides.rejected.get(source, ()), strict=True)
    return [replace(better, rejected=worse) for better, worse in found]
