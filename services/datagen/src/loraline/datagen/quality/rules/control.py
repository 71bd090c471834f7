"""Control tokens of chat templates that stand in texts: the trainer and inference refuse such messages."""

from __future__ import annotations

from collections.abc import Iterator

import regex

from loraline.core.evidence.specials import SpecialTokens
from loraline.datagen.quality.rules.rule import RowRule, quoted
from loraline.datagen.quality.seen import SeenRow

USUAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
)  # fmt: skip
"""Spellings that stand in no text by chance. `<s>` (struck out in HTML) and `[INST]` are left to the tokenizer."""
_USUAL = regex.compile("|".join(map(regex.escape, USUAL)))


class ControlRule(RowRule):
    """Texts that spell a control token: of the base model's tokenizer, or without one in the usual spellings."""

    def __init__(self, specials: SpecialTokens | None = None) -> None:
        super().__init__()
        self._specials = specials

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row: its first control token."""
        token = next(filter(None, (self._first_in(message["content"]) for message in row.messages)), "")
        if token:
            yield "CONTROL_TOKEN", f"control tokens of chat templates in the text, such as {quoted(token)}."

    def _first_in(self, text: str) -> str:
        if self._specials is not None:
            return self._specials.first_in(text)
        found = _USUAL.search(text)
        return found.group() if found else ""
