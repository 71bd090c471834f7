"""The check of a dataset: every rule sees every row once, one row at a time."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loraline.datagen.publish.spool import Lengths
from loraline.datagen.quality.findings import Finding, gravest_first, rows_text
from loraline.datagen.quality.rules.answers import AnswersRule
from loraline.datagen.quality.rules.control import ControlRule
from loraline.datagen.quality.rules.damage import DamageRule
from loraline.datagen.quality.rules.duplicates import DuplicatesRule
from loraline.datagen.quality.rules.formats import FormatsRule
from loraline.datagen.quality.rules.instructions import InstructionsRule
from loraline.datagen.quality.rules.language import LanguageRule
from loraline.datagen.quality.rules.monotony import MonotonyRule
from loraline.datagen.quality.rules.near import NearDuplicatesRule
from loraline.datagen.quality.rules.rule import Rule
from loraline.datagen.quality.rules.shape import ShapeRule
from loraline.datagen.quality.rules.spacing import SpacingRule
from loraline.datagen.quality.rules.tokens import TokensRule
from loraline.datagen.quality.rules.variety import VarietyRule
from loraline.datagen.quality.seen import FILES, TRAIN, VALIDATION, LineIndex, SeenRow, messages_of, read_rows
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.quality.tokenizer import load_tokenizer, special_tokens

ADVISED_ROWS = 500
"""From the field's practice: below this, runs on personas and commands learnt form and not content."""
TELL_EVERY = 1000

Progress = Callable[[int], None]


class DatasetCheck:
    """Collects what is wrong while the rows go by. What grows with their number lies in `scratch`, on disk."""

    def __init__(self, settings: CheckSettings, scratch: Path) -> None:
        self.rows: Counter[str] = Counter()
        self.index = LineIndex()
        self._shape = ShapeRule()
        self._rules: list[Rule] = [
            self._shape, AnswersRule(settings), DuplicatesRule(scratch),
            NearDuplicatesRule(scratch, settings.similarity), InstructionsRule(), MonotonyRule(), VarietyRule(),
            DamageRule(), LanguageRule(settings), SpacingRule(), FormatsRule(),
        ]  # fmt: skip
        tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer is not None else None
        self._rules.append(ControlRule(special_tokens(tokenizer) if tokenizer is not None else None))
        if tokenizer is not None:
            self._rules.append(TokensRule(tokenizer, settings.max_length))
        self._prompts, self._answers = Lengths(), Lengths()
        self.findings: list[Finding] = []
        """What was found, gravest first; there once finish() was called."""

    def add(self, name: str, line: int, row: Any) -> None:
        """Check one row; rows of train.jsonl come first."""
        number = self.index.number(name, line)
        self.rows[name] += 1
        messages = messages_of(row)
        if messages is None:
            self._shape.see_unreadable(number)
            return
        seen = SeenRow(name, number, row, messages)
        for rule in self._rules:
            rule.see(seen)
        self._prompts.add(len(seen.prompt))
        for answer in seen.answers:
            self._answers.add(len(answer))

    def finish(self) -> list[Finding]:
        """Return everything found, gravest first."""
        total = self.rows.total()
        found = list(self._sizes(total))
        for rule in self._rules:
            found.extend(rule.findings(total, self.index))
        for finding in found:
            finding.rows = [self.index.place(number) for number in finding.numbers]
        self.findings = gravest_first(found)
        return self.findings

    def _sizes(self, total: int) -> Iterator[Finding]:
        if not self.rows[TRAIN]:
            yield Finding("EMPTY_DATASET", f"{TRAIN} has no rows.")
        elif total < ADVISED_ROWS:
            yield Finding("FEW_ROWS", f"The dataset has {rows_text(total)}; {ADVISED_ROWS} are advised.", total)
        if self.rows[TRAIN] and not self.rows[VALIDATION]:
            yield Finding("NO_VALIDATION_ROWS", "The dataset has no validation rows.")

    def figures(self) -> dict[str, Any]:
        """Return what the report draws: lengths, languages, kinds, formats, duplicates, emoji, tokens."""
        figures: dict[str, Any] = {"duplicates": {}}
        for rule in self._rules:
            told = rule.figures()
            figures["duplicates"].update(told.pop("duplicates", {}))
            figures.update(told)
        return {**figures, "prompt_characters": self._prompts, "answer_characters": self._answers}


def check_folder(
    folder: Path,
    settings: CheckSettings | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> DatasetCheck:
    """Check a dataset's folder; a missing file counts as an empty one.

    `scratch` is an existing folder for what does not fit into memory (a sketch of some 500 bytes a row; removed at the
    end); `progress` hears the number of rows read, now and then.
    """
    with tempfile.TemporaryDirectory(prefix="check-", dir=scratch) as own:
        check = DatasetCheck(settings or CheckSettings(), Path(own))
        for name in FILES:
            if not (folder / name).is_file():
                continue
            for line, row in read_rows(folder / name):
                check.add(name, line, row)
                if progress is not None and check.rows.total() % TELL_EVERY == 0:
                    progress(check.rows.total())
        check.finish()
    return check
