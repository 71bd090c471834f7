"""The rules of single rows, for a source that can make another row in place of a bad one."""

from __future__ import annotations

from loraline.datagen.quality.fix import mend
from loraline.datagen.quality.gate import Gate
from loraline.datagen.quality.rules.answers import AnswersRule
from loraline.datagen.quality.rules.control import ControlRule
from loraline.datagen.quality.rules.damage import DamageRule
from loraline.datagen.quality.rules.language import LanguageRule
from loraline.datagen.quality.rules.rule import RowRule
from loraline.datagen.quality.rules.shape import ShapeRule
from loraline.datagen.quality.rules.spacing import SpacingRule
from loraline.datagen.quality.rules.tokens import TokensRule
from loraline.datagen.quality.seen import SeenRow
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.quality.tokenizer import load_tokenizer, special_tokens
from loraline.datagen.rows import Row


class RowCheck:
    """Mends rows as the safe fixes do, and tells which rule of the gate a row breaks: the same code as the check of a
    whole dataset, row by row."""

    def __init__(self, settings: CheckSettings | None = None, gate: Gate | None = None) -> None:
        settings = settings or CheckSettings()
        self._gate = gate or Gate()
        self._rules: list[RowRule] = [ShapeRule(), AnswersRule(settings), DamageRule(), LanguageRule(settings)]
        if self._gate.refuses("SPACING_ERRORS"):
            self._rules.append(SpacingRule())
        tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer is not None else None
        self._rules.append(ControlRule(special_tokens(tokenizer) if tokenizer is not None else None))
        if tokenizer is not None:
            self._rules.append(TokensRule(tokenizer, settings.max_length))

    def mended(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Return the messages normalised and trimmed, without fences around JSON unless the gate allows them."""
        fixed, codes = mend(messages)
        return messages if "FENCED_JSON" in codes and not self._gate.refuses("FENCED_JSON") else fixed

    def fault(self, row: Row) -> str:
        """Return the code of the first fault for which the gate would refuse a dataset with this row, or nothing."""
        seen = SeenRow("", 0, {"kind": row.kind, "format": row.format}, row.messages)
        codes = (code for rule in self._rules for code, _ in rule.faults_of(seen))
        return next((code for code in codes if self._gate.refuses(code)), "")
