"""A language rule: what an answer's texts may be written in and what they may not hold."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.language import scripts

FOLLOW = "question"
FORBIDDABLE = ("latin", "digits", "emoji", "markdown", "symbols")
"""What a rule can forbid; `symbols` is everything but letters, digits, spaces and a sentence's punctuation."""
_SENTENCE = ".,!?'():;~…·-、。，！？：；（）‘’“”「」《》"
_SYMBOLS = '"#$%&*+/<=>@[\\]^_`{|}€£¥₩©®™°℃±×÷–—〈〉『』【】％～'
_MARKDOWN = "*_`#|~<>[]+"
_IN_STRING = '"\\'
"""What a JSON string only holds escaped, and a decoder's class therefore leaves out."""


@dataclass(frozen=True)
class LanguageRule:
    """One language, or none, and what is forbidden besides the letters of others."""

    language: str = ""
    """`ko`, `zh` or `en`; empty for any."""
    forbid: tuple[str, ...] = ()

    def problem(self, text: str) -> str:
        """Return what in a text breaks the rule, in words; nothing when it holds."""
        if self.language and (stray := scripts.stray_letter(text, self.language)):
            return f"it holds {_shown(stray)}, which is not {scripts.LANGUAGES[self.language]}"
        for name in self.forbid:
            if found := _found(name, text):
                return f"it holds {name}, such as {_shown(found)}"
        return ""

    def characters(self, *, in_json: bool) -> tuple[str, str]:
        """Return two character classes for decoding, without brackets: of what may begin a word, and of all."""
        letters = self._letters()
        signs = set(_SENTENCE if "symbols" in self.forbid else _SENTENCE + _SYMBOLS)
        if "markdown" in self.forbid:
            signs -= set(_MARKDOWN)
        if in_json:
            signs -= set(_IN_STRING)
        kept = letters + ("" if "digits" in self.forbid else "0-9")
        if not {"emoji", "symbols"} & set(self.forbid):
            kept += scripts.EMOJI
        kept += "".join(_escaped(sign) for sign in sorted(signs))
        # Lines begin what Markdown knows: lists, headings. In JSON a line break is an escape.
        spaces = " " if in_json or "markdown" in self.forbid else " \\n"
        return kept, kept + spaces

    def string_pattern(self, least: int, most: int | None) -> str:
        """Return the regular expression of a JSON string's text of that many characters, without endless spaces."""
        word, every = self.characters(in_json=True)
        if most == 0:
            return "^$"
        if most is None:
            body = f"(?:[{word}] ?){{{max(1, least)},}}" if least > 1 else f"(?:[{word}] ?)+"
        else:
            body = f"[{word}][{every}]{{{max(0, least - 1)},{most - 1}}}"
        return f"^{body}$" if least else f"^(?:{body})?$"

    def text_pattern(self) -> str:
        """Return the regular expression of a plain answer: words of allowed characters, one space between them."""
        word, every = self.characters(in_json=False)
        space = "[ \\n]" if "\\n" in every else " "
        return f"(?:[{word}]{space}?)+"

    def _letters(self) -> str:
        if self.language:
            return scripts.LETTERS[self.language] if "latin" not in self.forbid or self.language != "en" else ""
        known = [letters for name, letters in scripts.LETTERS.items() if name != "en" or "latin" not in self.forbid]
        return "".join(known)


def rule_of(language: str, forbid: Sequence[str], question: str, path: str = "language") -> LanguageRule | None:
    """Return the rule that a request asks for; `question` is the text whose language `question` follows.

    None when there is nothing to hold to, as for a question in none of the known languages. INVALID_ARGUMENT names
    the field, below `path`.
    """
    check_names(language, forbid, path)
    spoken = scripts.language_of(question) if language == FOLLOW else language
    return LanguageRule(spoken, tuple(sorted(set(forbid)))) if spoken or forbid else None


def check_names(language: str, forbid: Iterable[str], path: str = "language") -> None:
    """Raise INVALID_ARGUMENT LANGUAGE_RULE_INVALID for a language or a prohibition that there is not."""
    if language and language != FOLLOW and language not in scripts.LANGUAGES:
        known = ", ".join([*scripts.LANGUAGES, FOLLOW])
        raise _wrong(path, f"{language!r} is no language rule. There are {known}.")
    for name in forbid:
        if name not in FORBIDDABLE:
            raise _wrong("forbid", f"{name!r} cannot be forbidden. There are {', '.join(FORBIDDABLE)}.")
    if language == "en" and "latin" in forbid:
        raise _wrong("forbid", "English cannot be written without latin. Leave one of them out.")


def _found(name: str, text: str) -> str:
    if name == "latin":
        return next((character for character in text if scripts.script_of(character) == "en"), "")
    if name == "digits":
        return next((character for character in text if unicodedata.category(character) == "Nd"), "")
    if name == "emoji":
        return scripts.first_emoji(text)
    if name == "markdown":
        return scripts.first_markdown(text)
    return next((character for character in text if _is_symbol(character)), "")


def _is_symbol(character: str) -> bool:
    return not (character.isspace() or character in _SENTENCE or unicodedata.category(character)[0] in "LNM")


def _escaped(sign: str) -> str:
    return "\\" + sign if sign in "\\]^-[" else sign


def _shown(text: str) -> str:
    return ascii(text)[1:-1] if not text.isprintable() else repr(text[:20])


def _wrong(path: str, message: str) -> LoralineError:
    return invalid_argument("LANGUAGE_RULE_INVALID", message, **{path.replace(".", "__"): message})
