"""Answers in the wrong language, and what the gate forbids in answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import regex

from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.rules.rule import Faults, Rule, quoted
from loraline.datagen.quality.scripts import DIGITS, EMOJI, LATIN, language_of, letters_by_script
from loraline.datagen.quality.seen import LineIndex, SeenRow
from loraline.datagen.quality.settings import CheckSettings

NAMES = {"ko": "Korean", "zh": "Chinese", "en": "English"}
_LANGUAGE = {"ko": "ko", "zh": "zh", "latin": "en"}
# Headings, quotations, list items, tables; bold and struck text; code; links and pictures (CommonMark and GitHub's).
MARKDOWN = regex.compile(
    r"(?m)^ {0,3}(?:#{1,6}\s|>\s|[-*+]\s|\d{1,3}[.)]\s|\|.*\||```|~~~)"
    r"|\*\*[^*\n]+\*\*|__[^_\n]+__|~~[^~\n]+~~|`[^`\n]+`|!?\[[^\]\n]*\]\([^)\n]+\)"
)
_FORBIDDEN = {"latin": LATIN, "digits": DIGITS, "emoji": EMOJI, "markdown": MARKDOWN}
_FOREIGN = {
    "ko": regex.compile(r"(?V1)[\p{L}--\p{Hangul}]+"),
    "zh": regex.compile(r"(?V1)[\p{L}--\p{Han}]+"),
    "en": regex.compile(r"(?V1)[\p{L}--\p{Latin}]+"),
}


class LanguageRule(Rule):
    """Purity of language in answers, judged by script; of JSON only the texts count, not the names of fields.

    An answer is in the wrong language when most of its letters are of another script (Han and Hangul weigh more than
    Latin: they say more), else stray letters are told. What a row with no letters at all is in, nobody can tell.
    """

    def __init__(self, settings: CheckSettings) -> None:
        self._language, self._forbid = settings.language, settings.forbid
        self._faults = Faults()
        self._languages: Counter[str] = Counter()

    def see(self, row: SeenRow) -> None:
        """Check one row's answers."""
        text = row.spoken
        found = language_of(letters_by_script(text))
        self._languages[found] += 1
        if self._language and found != "none":
            self._check_language(row, text, _LANGUAGE.get(found, found))
        for name in sorted(self._forbid):
            match = _FORBIDDEN[name].search(row.answer if name == "markdown" and not row.json_object else text)
            if match is not None:
                told = f"{name} in the answer, such as {quoted(match.group(), 30)}."
                self._faults.add(f"FORBIDDEN_{name.upper()}", row.number, told)

    def _check_language(self, row: SeenRow, text: str, found: str) -> None:
        wanted = NAMES[self._language]
        if found != self._language:
            self._faults.add("WRONG_LANGUAGE", row.number, f"not {wanted}, such as {quoted(text)}.")
            return
        stray = _FOREIGN[self._language].search(text)
        if stray is not None:
            told = f"letters that are not {wanted}, such as {quoted(stray.group(), 30)}."
            self._faults.add("FOREIGN_LETTERS", row.number, told)

    def findings(self, total: int, index: LineIndex) -> Iterator[Finding]:
        """Yield each fault."""
        yield from self._faults.findings(total)

    def figures(self) -> dict[str, Any]:
        """Return rows by language."""
        return {"languages": dict(self._languages.most_common())}
