"""The conversion itself: files in, rows out, everything left out counted."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from loraline.core.errors import LoralineError
from loraline.datagen.convert.files import SourceFile, SourceFiles
from loraline.datagen.convert.problems import bad_record
from loraline.datagen.convert.readers import READERS
from loraline.datagen.convert.rules import BACKGROUND, Evidence, Rule, classify
from loraline.datagen.convert.script import read_script
from loraline.datagen.convert.shapes import Conversation, ShapeError, parse
from loraline.datagen.rows import Row

SAMPLES_KEPT = 20

# A description without a question still needs a user turn. Several wordings, chosen by the text's hash: with a single
# one, a model learns to answer that one sentence and nothing else.
DESCRIPTION_PROMPTS = {
    "zh": ("请介绍一下{about}。", "跟我说说{about}吧。", "{about}是什么样的？", "我想了解{about}。"),
    "ko": ("{about}에 대해 소개해 줘.", "{about}에 대해 알려 줘.", "{about}에 대해 알고 싶어."),
    "en": ("Tell me about {about}.", "What should I know about {about}?", "Describe {about}."),
}  # fmt: skip
WORLD = {"zh": ("{character}的世界", "这里的设定"), "ko": ("{character}의 세계", "이곳의 설정"),
         "en": ("{character}'s world", "this world")}  # fmt: skip


@dataclass(frozen=True)
class ConvertSettings:
    """What a source says about its records; the meanings are those of ConvertSource in the contract."""

    character: str = ""
    aliases: tuple[str, ...] = ()
    system_prompt: str = ""
    default_prompt: str = ""
    skip_bad_records: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The character's names in lower case."""
        return frozenset(name.strip().lower() for name in (self.character, *self.aliases) if name.strip())

    @property
    def system(self) -> str:
        """The system prompt with the character's name in place."""
        return self.system_prompt.replace("{character}", self.character)


@dataclass
class ConvertCounts:
    """What happened on the way; filled while the rows are read."""

    outcomes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    ignored_files: list[str] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)


def convert(source: SourceFiles, settings: ConvertSettings, counts: ConvertCounts) -> Iterator[Row]:
    """Yield the rows of all files in order.

    A record that cannot be used raises its error, or is counted in `counts` when settings.skip_bad_records is on.
    """
    counts.ignored_files.extend(source.ignored)
    for file in source.files:
        for found in _guarded(file, settings):
            if isinstance(found, LoralineError):
                if not settings.skip_bad_records:
                    raise found
                counts.outcomes["bad_record"] += 1
                if len(counts.bad_records) < SAMPLES_KEPT:
                    counts.bad_records.append(found.message)
                continue
            line, conversation = found
            counts.notes.update(conversation.notes)
            row = _row(file, line, conversation, settings)
            if row is None:
                counts.outcomes["no_prompt"] += 1
                continue
            counts.shapes[conversation.shape] += 1
            counts.files[file.name] += 1
            yield row


Found = tuple[int, Conversation] | LoralineError


def _guarded(file: SourceFile, settings: ConvertSettings) -> Iterator[Found]:
    """Yield what the file holds; an error about the file as a whole is yielded like one about a record."""
    try:
        yield from _conversations(file, settings)
    except LoralineError as error:
        if "file" not in error.metadata:  # About the request, not about the file: skipping records cannot help.
            raise
        yield error


def _conversations(file: SourceFile, settings: ConvertSettings) -> Iterator[Found]:
    if file.path.suffix.lower() == ".txt":
        yield from read_script(file, settings.names)
        return
    for record in READERS[file.path.suffix.lower()](file):
        if isinstance(record, LoralineError):
            yield record
            continue
        try:
            yield record.line, parse(record.data, settings.names)
        except ShapeError as error:
            yield bad_record(error.reason, file.name, record.line, error.what, error.remedy)


def _row(file: SourceFile, line: int, conversation: Conversation, settings: ConvertSettings) -> Row | None:
    rule = classify(
        Evidence(conversation.asked, conversation.shape, conversation.title, file.folders, settings.names)
    )  # fmt: skip
    turns = _with_first_turn(conversation, rule, settings)
    if turns is None:
        return None
    if settings.system:
        turns = [("system", settings.system), *(turn for turn in turns if turn[0] != "system")]
    messages = [{"role": role, "content": text} for role, text in turns]
    return Row(messages, rule.kind, rule.name, f"{file.name}:{line}", conversation.format)


def _with_first_turn(conversation: Conversation, rule: Rule, settings: ConvertSettings) -> list[tuple[str, str]] | None:
    """Return turns that begin with a question, or None when there is none to give."""
    turns = conversation.turns
    head = turns[:1] if turns[0][0] == "system" else []
    rest = turns[len(head) :]
    if rest[0][0] == "user":
        return turns
    prompt = settings.default_prompt.replace("{character}", settings.character)
    if not prompt and rule.kind == BACKGROUND:
        prompt = conversation.title or _description_prompt(rest[0][1], (settings.character, *settings.aliases))
    if prompt:
        return [*head, ("user", prompt), *rest]
    if len(rest) > 2:  # A greeting before the first question: the conversation can do without it.
        conversation.notes.append("greeting_dropped")
        return [*head, *rest[1:]]
    return None


def _description_prompt(text: str, names: tuple[str, ...]) -> str:
    language = "zh" if re.search(r"[\u4e00-\u9fff]", text) else "ko" if re.search(r"[\uac00-\ud7a3]", text) else "en"
    in_script = [name for name in names if name and name.isascii() == (language == "en")]
    character = (in_script or [name for name in names if name] or [""])[0]
    world = WORLD[language][0].format(character=character) if character else WORLD[language][1]
    wordings = DESCRIPTION_PROMPTS[language]
    choice = hashlib.sha256(text.encode()).digest()[0] % len(wordings)
    return wordings[choice].format(about=world)
