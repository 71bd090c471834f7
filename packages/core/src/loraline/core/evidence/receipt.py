"""The token receipt: which ids and which loss mask an adapter was trained on.

The trainer writes it before the first step. Whoever serves or merges the adapter renders the same messages with its own
tokenizer and template and compares: another id means that the model would see prompts it was never trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraline.core.evidence.fields import Fields, read_object, write_object

FILE_NAME = "token_receipt.json"
VERSION = 1
MAX_ROWS = 16
"""Rows that a receipt shows at most."""

_LATER = ("split_rows", "unique_rows", "dropped_validation_rows")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ReceiptCounts:
    """Counts over every row of the run, not only over the rows shown."""

    rows: int = 0
    """Rows trained on."""
    tokens: int = 0
    """Tokens in them."""
    trained_tokens: int = 0
    """Tokens that carry loss."""
    truncated_rows: int = 0
    """Rows cut at the greatest length."""
    dropped_rows: int = 0
    """Rows left out because of their length."""
    fully_masked_rows: int = 0
    """Rows without any token that carries loss."""
    rows_teaching_eos: int = 0
    """Rows whose end-of-sequence token carries loss."""
    split_rows: int = 0
    """Rows that became several because of their length; `rows` counts the pieces."""
    unique_rows: int = 0
    """Rows of the datasets that are trained on, each counted once: without repetitions, and not in pieces."""
    dropped_validation_rows: int = 0
    """Validation rows left out because of their length."""


@dataclass(frozen=True)
class ReceiptRow:
    """One row as it was trained on."""

    source: str
    """Where it came from, such as `train.jsonl:17`."""
    messages: Messages
    """The messages that were rendered."""
    input_ids: list[int]
    """The ids, after truncation."""
    labels_mask: list[int]
    """1 where the token carries loss, else 0; as long as input_ids."""
    sha256: str = ""
    """Digest of the ids, see digest_ids; filled in when empty."""

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", digest_ids(self.input_ids))


@dataclass(frozen=True)
class TokenReceipt:
    """What a run trained on, proven on some of its rows."""

    chat_template_sha256: str
    """Digest of the chat template's text in UTF-8."""
    mask_method: str
    """`generation_marks` or `prefix_difference`."""
    eos_token_id: int
    """The id that ends an answer."""
    counts: ReceiptCounts = ReceiptCounts()
    rows: list[ReceiptRow] = field(default_factory=list)

    def save(self, folder: Path, name: str = FILE_NAME) -> Path:
        """Write token_receipt.json, or a file of another name, into the folder and return its path."""
        path = folder / name
        write_object(path, {"version": VERSION, **asdict(self)})
        return path


@dataclass(frozen=True)
class RenderingMismatch:
    """A row that renders to other ids than in training."""

    source: str
    """The row."""
    position: int
    """First token that differs."""
    expected: int | None
    """Id in the receipt; None when the rendering is longer."""
    rendered: int | None
    """Id rendered now; None when the rendering is shorter."""

    def __str__(self) -> str:
        return f"{self.source}: token {self.position} is {self.rendered}, was {self.expected} in training"


def digest_ids(ids: Sequence[int]) -> str:
    """Return the SHA-256 of the ids written as decimal numbers with commas between."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, as used for chat templates."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_receipt(path: Path) -> TokenReceipt:
    """Read a receipt from a file, or from an adapter's folder.

    Raises NOT_FOUND (TOKEN_RECEIPT_MISSING) or DATA_LOSS (TOKEN_RECEIPT_MALFORMED).
    """
    file = path / FILE_NAME if path.is_dir() else path
    fields = read_object(file, version=VERSION, missing="TOKEN_RECEIPT_MISSING", malformed="TOKEN_RECEIPT_MALFORMED")
    return TokenReceipt(
        chat_template_sha256=fields.text("chat_template_sha256"),
        mask_method=fields.text("mask_method"),
        eos_token_id=fields.integer("eos_token_id"),
        counts=_counts(fields.object("counts")),
        rows=[_row(row) for row in fields.objects("rows")],
    )


def _counts(fields: Fields) -> ReceiptCounts:
    names: list[str] = list(ReceiptCounts.__dataclass_fields__)
    # Receipts of earlier releases do not know the counts that came later.
    values: dict[str, Any] = {
        name: fields.integer(name) for name in names if name in fields.content or name not in _LATER
    }
    return ReceiptCounts(**values)


def _row(fields: Fields) -> ReceiptRow:
    ids, mask, digest = fields.integers("input_ids"), fields.integers("labels_mask"), fields.text("sha256")
    if len(mask) != len(ids) or any(value > 1 for value in mask):
        raise fields.error("labels_mask", "is not a 0 or 1 for each of input_ids")
    if digest != digest_ids(ids):
        raise fields.error("sha256", "is not the digest of input_ids")
    return ReceiptRow(fields.text("source"), fields.messages("messages"), ids, mask, digest)


def compare_rendering(receipt: TokenReceipt, render: Callable[[Messages], list[int]]) -> list[RenderingMismatch]:
    """Render every row again and return the rows that differ; empty means the same ids everywhere.

    `render` gives the ids of whole conversations, without a generation prompt. A row that was truncated in training is
    compared as far as it went.
    """
    found = []
    for row in receipt.rows:
        mismatch = _first_difference(row, render(row.messages), may_be_cut=receipt.counts.truncated_rows > 0)
        if mismatch:
            found.append(mismatch)
    return found


def _first_difference(row: ReceiptRow, rendered: list[int], *, may_be_cut: bool) -> RenderingMismatch | None:
    expected = row.input_ids
    for position, (was, now) in enumerate(zip(expected, rendered, strict=False)):
        if was != now:
            return RenderingMismatch(row.source, position, was, now)
    if len(rendered) < len(expected):
        return RenderingMismatch(row.source, len(rendered), expected[len(rendered)], None)
    if len(rendered) > len(expected) and not may_be_cut:
        return RenderingMismatch(row.source, len(expected), None, rendered[len(expected)])
    return None
