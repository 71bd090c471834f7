"""From rows to the training set and its token receipt; refuses what could not be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.receipt import MAX_ROWS, ReceiptCounts, ReceiptRow, TokenReceipt
from loraline.core.evidence.specials import SpecialTokens
from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow, MaskNotProven
from loraline.trainer.rows import Mixture, Row, rows_error


@dataclass(frozen=True)
class LengthRule:
    """What happens to long rows."""

    max_length: int
    """Longest row in tokens."""
    policy: str = "error"
    """`error`, `truncate` or `drop`."""
    max_truncated_share: float = 0.1
    """Share of rows that may be cut under `truncate`."""


@dataclass(frozen=True)
class PreparedData:
    """What is trained on, and its evidence."""

    train: list[EncodedRow]
    validation: list[EncodedRow]
    receipt: TokenReceipt

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return max(len(row.input_ids) for row in self.train)


def prepare(mixture: Mixture, encoder: ChatEncoder, rule: LengthRule, *, allow_unlearned_eos: bool) -> PreparedData:
    """Encode every row and make the receipt.

    Raises INVALID_ARGUMENT with the rows' numbers: SPECIAL_TOKEN_IN_TEXT, ROWS_TOO_LONG, ROWS_FULLY_MASKED,
    MASK_NOT_PROVEN; or FAILED_PRECONDITION: TOO_MANY_TRUNCATED, ALL_ROWS_DROPPED, EOS_NOT_LEARNED.
    """
    _refuse_control_tokens([*mixture.train, *mixture.validation], encoder)
    encoded = _encode_unique(mixture.train, encoder)
    kept = _apply_lengths(encoded, rule)
    train = [kept[row.source] for row in mixture.train if row.source in kept]
    if not train:
        message = f"Every row is longer than max_length {rule.max_length} and was dropped. Raise parameters.max_length."
        raise failed_precondition("ALL_ROWS_DROPPED", message)
    _refuse_fully_masked(kept)
    validation = list(
        _apply_lengths(_encode_unique(mixture.validation, encoder), replace(rule, policy="drop")).values()
    )
    receipt = _receipt(mixture, encoder, train)
    if receipt.counts.rows_teaching_eos == 0 and not allow_unlearned_eos:
        raise _eos_not_learned(encoder)
    return PreparedData(train, validation, receipt)


def _refuse_control_tokens(rows: Sequence[Row], encoder: ChatEncoder) -> None:
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


def _encode_unique(rows: Sequence[Row], encoder: ChatEncoder) -> dict[str, EncodedRow]:
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


def _apply_lengths(encoded: dict[str, EncodedRow], rule: LengthRule) -> dict[str, EncodedRow]:
    long = {source: row for source, row in encoded.items() if len(row.input_ids) > rule.max_length}
    if not long:
        return encoded
    if rule.policy == "error":
        problems = {source: f"has {len(row.input_ids)} tokens" for source, row in long.items()}
        what = (
            f"are longer than max_length {rule.max_length}; raise parameters.max_length, or choose length_policy "
            "truncate or drop"
        )
        raise rows_error("ROWS_TOO_LONG", what, problems)
    if rule.policy == "drop":
        return {source: row for source, row in encoded.items() if source not in long}
    share = len(long) / len(encoded)
    if share > rule.max_truncated_share:
        message = (
            f"{len(long)} of {len(encoded)} rows ({share:.0%}) would be cut at max_length {rule.max_length}; at most "
            f"{rule.max_truncated_share:.0%} may. Raise parameters.max_length or parameters.max_truncated_share."
        )
        raise failed_precondition("TOO_MANY_TRUNCATED", message, rows=str(len(long)))
    size = rule.max_length
    return {
        source: replace(row, input_ids=row.input_ids[:size], mask=row.mask[:size], truncated=True)
        if source in long
        else row
        for source, row in encoded.items()
    }


def _refuse_fully_masked(encoded: dict[str, EncodedRow]) -> None:
    problems = {
        source: "lost every answer when it was cut" if row.truncated else "has no token of an answer"
        for source, row in encoded.items()
        # The first token is never predicted, so a mask on it alone trains nothing.
        if not any(row.mask[1:])
    }
    if problems:
        what = "carry no loss; raise parameters.max_length, or choose length_policy drop"
        raise rows_error("ROWS_FULLY_MASKED", what, problems)


def _receipt(mixture: Mixture, encoder: ChatEncoder, train: Sequence[EncodedRow]) -> TokenReceipt:
    ends = Counter(
        token
        for row in train
        for token, kept in zip(row.input_ids, row.mask, strict=True)
        if kept and token in encoder.eos_ids
    )
    main_eos = encoder.tokenizer.eos_token_id
    eos = ends.most_common(1)[0][0] if ends else int(main_eos if isinstance(main_eos, int) else min(encoder.eos_ids))
    counts = ReceiptCounts(
        rows=len(train),
        tokens=sum(len(row.input_ids) for row in train),
        trained_tokens=sum(sum(row.mask[1:]) for row in train),
        truncated_rows=sum(row.truncated for row in train),
        dropped_rows=len(mixture.train) - len(train),
        fully_masked_rows=sum(not any(row.mask[1:]) for row in train),
        rows_teaching_eos=sum(_teaches(row, encoder.eos_ids) for row in train),
    )
    shown = list({row.source: row for row in train}.values())
    shown.sort(key=lambda row: row.truncated)
    rows = [ReceiptRow(row.source, row.messages, row.input_ids, row.mask) for row in shown[:MAX_ROWS]]
    return TokenReceipt(encoder.template_sha256, encoder.method, eos, counts, rows)


def _teaches(row: EncodedRow, eos_ids: frozenset[int]) -> bool:
    return any(kept and token in eos_ids for token, kept in zip(row.input_ids, row.mask, strict=True))


def _eos_not_learned(encoder: ChatEncoder) -> LoralineError:
    names = ", ".join(sorted(map(str, encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.eos_ids)))))
    message = (
        f"No row teaches an end-of-sequence token ({names}): the chat template ends answers with something else, so "
        "the tuned model would never stop. Put the token behind the answer in the template, set the template's own end "
        "token as eos_token_id in generation_config.json, or set parameters.allow_unlearned_eos."
    )
    return failed_precondition("EOS_NOT_LEARNED", message)
