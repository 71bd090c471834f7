"""Which kind a record is, decided from its `input`: an ordered table of named rules, the first that holds decides.

The name of the rule goes into the row, so that a person can see why a row is what it is, and correct the material.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

BACKGROUND, SETTINGS_QA, DIALOGUE = "background", "settings_qa", "dialogue"

HEADING = re.compile(
    r"^\s*(背景|人物|角色|设定|設定|世界观|世界觀|地点|background|character|setting|world|lore|배경|인물|설정|세계관)"
    r"[^:：\n]{0,12}[:：]",
    re.IGNORECASE,
)
QUESTION_MARK = re.compile(r"[?？]\s*[\"”』」]?\s*$")
QUESTION_WORD = re.compile(
    r"(谁|什么|哪|怎么|怎样|为什么|多少|几|吗|呢)[。.!！]?\s*$"
    r"|^\s*(who|what|where|when|why|how|which|whose|does|did|do|is|are|was|were|can|has|have)\b"
    r"|(누구|무엇|뭐|어디|언제|왜|어떻게|몇)",
    re.IGNORECASE,
)
YOU = re.compile(r"[你您妳]|\b(you|your|yours)\b|너|당신|네가", re.IGNORECASE)
SETTINGS_FOLDER = re.compile(
    r"(^|[-_ .])(settings?|facts?|lore|world|background|notes)($|[-_ .])|设定|設定|背景|설정|배경", re.IGNORECASE
)


@dataclass(frozen=True)
class Evidence:
    """What the rules look at: input, title and shape of the record, its folders, the character's names."""

    asked: str
    shape: str
    title: str = ""
    folders: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()

    @property
    def question(self) -> bool:
        """Whether the input asks something."""
        return bool(QUESTION_MARK.search(self.asked) or QUESTION_WORD.search(self.asked))

    @property
    def about_character(self) -> bool:
        """Whether the input speaks of the character in the third person: names it, and does not address anyone."""
        text = self.asked.casefold()
        named = any(name and re.search(_as_word(name), text) for name in self.names)
        return bool(named) and not YOU.search(self.asked) and not self._addressed(text)

    def _addressed(self, text: str) -> bool:
        # "晚上好，澜音。" and "Mareva, is it late?" call the character; they do not speak of it.
        for name in self.names:
            word = _as_word(name)
            called_first = re.search(rf"^\s*{word}\s*[,，!！。.~～]", text)
            if called_first or re.search(rf"[,，]\s*{word}\s*[。.!！?？~～]*\s*$", text):
                return True
        return False

    @property
    def in_settings(self) -> bool:
        """Whether the file or a folder above it is named for settings."""
        return any(SETTINGS_FOLDER.search(part) for part in self.folders)


def _as_word(name: str) -> str:
    escaped = re.escape(name.casefold())
    return rf"\b{escaped}\b" if name.isascii() else escaped


@dataclass(frozen=True)
class Rule:
    """A named condition and the kind it decides for."""

    name: str
    kind: str
    holds: Callable[[Evidence], bool]


RULES: tuple[Rule, ...] = (
    Rule("heading_in_input", BACKGROUND, lambda e: bool(HEADING.search(e.asked))),
    Rule("key_value_fact", BACKGROUND, lambda e: e.shape == "key_value" and not e.question),
    Rule("no_input_in_settings_folder", BACKGROUND, lambda e: not e.asked and e.in_settings),
    Rule("no_input_under_a_title", BACKGROUND, lambda e: not e.asked and bool(e.title)),
    Rule("question_about_character", SETTINGS_QA, lambda e: e.question and e.about_character),
    Rule("question_in_settings_folder", SETTINGS_QA, lambda e: e.question and e.in_settings),
    Rule("topic_in_settings_folder", BACKGROUND, lambda e: bool(e.asked) and e.in_settings),
    Rule("no_input", DIALOGUE, lambda e: not e.asked),
    Rule("plain_dialogue", DIALOGUE, lambda e: True),
)


def classify(evidence: Evidence) -> Rule:
    """Return the first rule that holds."""
    return next(rule for rule in RULES if rule.holds(evidence))
