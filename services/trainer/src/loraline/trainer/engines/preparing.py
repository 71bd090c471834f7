"""From rows to the training set and its token receipt; refuses what could not be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.receipt import MAX_ROWS, ReceiptCounts, ReceiptRow, TokenReceipt
from loraline.core.evidence.specials import SpecialTokens
from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow, MaskNotProven
from loraline.trainer.engines.lengths import LengthRule, Pieces, apply_lengths
from loraline.trainer.rows import Mixture, Row, rows_error


@dataclass(frozen=True)
class PreparedData:
    """What is trained on, and its evidence."""

    train: list[EncodedRow]
    validation: list[EncodedRow]
    receipt: TokenReceipt
    rejected: TokenReceipt | None = None
    """The same for the rejected answers of pairs; `receipt` is that of the chosen ones."""
    max_length: int = 0
    """Longest row that the run allows, in tokens."""


def prepare(mixture: Mixture, encoder: ChatEncoder, rule: LengthRule, *, allow_unlearned_eos: bool) -> PreparedData:
    """Encode every row and make the receipt.

    Raises INVALID_ARGUMENT with the rows' numbers: SPECIAL_TOKEN_IN_TEXT, ROWS_TOO_LONG, ROWS_FULLY_MASKED,
    MASK_NOT_PROVEN; or FAILED_PRECONDITION: TOO_MANY_TRUNCATED, ALL_ROWS_DROPPED, EOS_NOT_LEARNED.
    """
    refuse_control_tokens([*mixture.train, *mixture.validation], encoder)
    encoded = encode_unique(mixture.train, encoder)
    kept = apply_lengths(encoded, rule, encoder)
    train = [piece for row in mixture.train for piece in kept.get(row.source, ())]
    if not train:
        raise all_rows_dropped(rule)
    refuse_fully_masked(kept)
    held_out = apply_lengths(encode_unique(mixture.validation, encoder), replace(rule, policy="drop"), encoder)
    validation = [piece for pieces in held_out.values() for piece in pieces]
    receipt = receipt_of(mixture, encoder, train, kept, held_out)
    if receipt.counts.rows_teaching_eos == 0 and not allow_unlearned_eos:
        raise eos_not_learned(encoder)
    return PreparedData(train, validation, receipt, max_length=rule.max_length)


def refuse_control_tokens(rows: Sequence[Row], encoder: ChatEncoder) -> None:
    """Inference refuses such messages; training on them would teach turns that no question can have."""
    specials = SpecialTokens(encoder.tokenizer)
    problems: dict[str, str] = {}
    for source, row in {row.source: row for row in rows}.items():
        found = specials.problems(row.messages)
        if found:
            problems[source] = "; ".join(f"{path} {problem}" for path, problem in found.items())
    if problems:
        what = "would become control tokens of the chat template; write their text otherwise or leave them out"
        raise rows_error("SPECIAL_TOKEN_IN_TEXT", what, problems)


def encode_unique(rows: Sequence[Row], encoder: ChatEncoder) -> dict[str, EncodedRow]:
    """Encode each row once. Raises INVALID_ARGUMENT (MASK_NOT_PROVEN) with the rows' numbers."""
    encoded: dict[str, EncodedRow] = {}
    problems: dict[str, str] = {}
    for row in rows:
        if row.source in encoded or row.source in problems:
            continue
        try:
            encoded[row.source] = encoder.encode(row.source, row.messages)
        except MaskNotProven as error:
            problems[row.source] = str(error)
        except LoralineError as error:
            problems[row.source] = error.message
    if problems:
        what = f"cannot be masked with certainty by {encoder.method}"
        raise rows_error("MASK_NOT_PROVEN", what, problems)
    return encoded


def refuse_fully_masked(kept: Pieces) -> None:
    """Raise INVALID_ARGUMENT (ROWS_FULLY_MASKED) with the numbers of rows that nothing is learned from."""
    problems = {
        source: "lost every answer when it was cut" if row.truncated else "has no token of an answer"
        for source, pieces in kept.items()
        for row in pieces
        # The first token is never predicted, so a mask on it alone trains nothing.
        if not any(row.mask[1:])
    }
    if problems:
        what = "carry no loss; raise parameters.max_length, or choose length_policy drop"
        raise rows_error("ROWS_FULLY_MASKED", what, problems)


def receipt_of(
    mixture: Mixture, encoder: ChatEncoder, train: Sequence[EncodedRow], kept: Pieces, held_out: Pieces
) -> TokenReceipt:
    """Return the token receipt of the rows that are trained on.

    `kept` and `held_out` are what the length rule left of the rows for training and for validation.
    """
    # Repeated rows are one object and are looked at once.
    ends_of = {id(row): encoder.ends_of(row) for row in train}
    ends = Counter(token for row in train for token in ends_of[id(row)])
    main_eos = encoder.tokenizer.eos_token_id
    eos = ends.most_common(1)[0][0] if ends else int(main_eos if isinstance(main_eos, int) else min(encoder.eos_ids))
    counts = ReceiptCounts(
        rows=len(train),
        tokens=sum(len(row.input_ids) for row in train),
        trained_tokens=sum(sum(row.mask[1:]) for row in train),
        truncated_rows=sum(row.truncated for row in train),
        dropped_rows=sum(row.source not in kept for row in mixture.train),
        split_rows=sum(len(kept.get(row.source, ())) > 1 for row in mixture.train),
        dropped_validation_rows=sum(row.source not in held_out for row in mixture.validation),
        unique_rows=len({row.source for row in mixture.train if row.source in kept}),
        fully_masked_rows=sum(not any(row.mask[1:]) for row in train),
        rows_teaching_eos=sum(bool(ends_of[id(row)]) for row in train),
    )
    shown = list({row.source: row for row in train}.values())
    shown.sort(key=lambda row: row.truncated)
    rows = [ReceiptRow(row.source, row.messages, row.input_ids, row.mask) for row in shown[:MAX_ROWS]]
    return TokenReceipt(encoder.template_sha256, encoder.method, eos, counts, rows)


def left_out(counts: ReceiptCounts, bound: float) -> str:
    """Return what to warn of: more than the share `bound` of the rows, or validation rows, left out; else nothing."""
    told = []
    shown = counts.rows + counts.dropped_rows
    share = counts.dropped_rows / shown if shown else 0.0
    if share > bound:
        told.append(f"{counts.dropped_rows} rows of an epoch ({share:.0%}) are longer than max_length and are left out")
    if counts.dropped_validation_rows:
        told.append(f"{counts.dropped_validation_rows} validation rows are longer than max_length and are left out")
    return f"{'; '.join(told)}. Raise parameters.max_length." if told else ""


def all_rows_dropped(rule: LengthRule) -> LoralineError:
    """Return FAILED_PRECONDITION (ALL_ROWS_DROPPED)."""
    message = f"Every row is longer than max_length {rule.max_length} and was dropped. Raise parameters.max_length."
    return failed_precondition("ALL_ROWS_DROPPED", message)


def eos_not_learned(encoder: ChatEncoder) -> LoralineError:
    """Return FAILED_PRECONDITION (EOS_NOT_LEARNED)."""
    names = ", ".join(sorted(map(str, encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.eos_ids)))))
    message = (
        f"No row teaches an end-of-sequence token ({names}): the chat template ends answers with something else, so "
        "the tuned model would never stop. Put the token behind the answer in the template, set the template's own end "
        "token as eos_token_id in generation_config.json, or set parameters.allow_unlearned_eos."
    )
    return failed_precondition("EOS_NOT_LEARNED", message)
