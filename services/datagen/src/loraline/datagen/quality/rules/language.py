"""Answers in the wrong language, and what the gate forbids in answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import regex

from loraline.datagen.quality.latin import other_latin_language
from loraline.datagen.quality.rules.rule import RowRule, quoted
from loraline.datagen.quality.scripts import DIGITS, EMOJI, LATIN, language_of, letters_by_script
from loraline.datagen.quality.seen import SeenRow
from loraline.datagen.quality.settings import LANGUAGES, NO_PROMISE, PROMISES, CheckSettings

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


def is_written_in(text: str, language: str) -> bool:
    """Return whether most letters of a text are those of the language; a text without letters is fine."""
    found = language_of(letters_by_script(text))
    if found == "none":
        return True
    return _LANGUAGE.get(found, found) == language and not (language == "en" and other_latin_language(text))


class LanguageRule(RowRule):
    """Purity of language in answers, judged by script; of JSON only the texts count, not the names of fields.

    An answer is in the wrong language when most of its letters are of another script (Han and Hangul weigh more than
    Latin: they say more), or when English is wanted and its commonest words are another language's; else stray letters
    are told. What a row with no letters at all is in, nobody can tell.
    """

    def __init__(self, settings: CheckSettings) -> None:
        super().__init__()
        self._language, self._forbid = settings.language, settings.forbid
        self._languages: Counter[str] = Counter()

    def see(self, row: SeenRow) -> None:
        """Check one row's answers and count their language."""
        self._languages[row.language] += 1
        super().see(row)

    def faults_of(self, row: SeenRow) -> Iterator[tuple[str, str]]:
        """Check one row's answers."""
        text, promise = row.spoken, PROMISES.get(row.kind, NO_PROMISE)
        if self._language and row.language != "none" and promise.in_words:
            yield from self._language_of(text, _LANGUAGE.get(row.language, row.language))
        for name in sorted(self._forbid | promise.forbidden(self._language)):
            match = _FORBIDDEN[name].search(row.answer if name == "markdown" and not row.json_object else text)
            if match is not None:
                yield f"FORBIDDEN_{name.upper()}", f"{name} in the answer, such as {quoted(match.group(), 30)}."

    def _language_of(self, text: str, found: str) -> Iterator[tuple[str, str]]:
        wanted = LANGUAGES[self._language]
        if found != self._language or (found == "en" and other_latin_language(text)):
            yield "WRONG_LANGUAGE", f"not {wanted}, such as {quoted(text)}."
            return
        stray = _FOREIGN[self._language].search(text)
        if stray is not None:
            yield "FOREIGN_LETTERS", f"letters that are not {wanted}, such as {quoted(stray.group(), 30)}."

    def figures(self) -> dict[str, Any]:
        """Return rows by language."""
        return {"languages": dict(self._languages.most_common())}
