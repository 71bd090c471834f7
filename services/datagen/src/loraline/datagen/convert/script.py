"""Scripts: text files of `speaker: line`, with narration in parentheses.

A blank line ends an exchange once the character has answered. Lines without a speaker go on with the line before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from loraline.core.errors import LoralineError
from loraline.datagen.convert.files import SourceFile
from loraline.datagen.convert.problems import bad_location, bad_record
from loraline.datagen.convert.shapes import Conversation
from loraline.datagen.convert.text import open_text

SPOKEN = re.compile(r"^\s*(?P<speaker>[^:：]{1,40}?)\s*[:：](?!//)\s*(?P<line>.*?)\s*$")
NARRATION = re.compile(r"^\s*[(（\[【].*[)）\]】]\s*$")
DIRECTION = re.compile(r"\s*[(（\[【][^)）\]】]*[)）\]】]\s*")


@dataclass
class _Exchange:
    """What was said since the last blank line that ended something."""

    start: int = 0
    said: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, speaker: str, line: str, number: int) -> None:
        if not self.said:
            self.start = number
        if self.said and self.said[-1][0] == speaker:
            self.said[-1][1].append(line)
        else:
            self.said.append((speaker, [line]))


def read_script(file: SourceFile, names: frozenset[str]) -> Iterator[tuple[int, Conversation] | LoralineError]:
    """Yield each exchange with the line it begins on. `names` are the character's, lower-case."""
    if not names:
        raise bad_location(
            "CHARACTER_MISSING", "source.character", f"{file.name} is a script, and no character is given.",
            "Give the name of the speaker whose lines shall be learnt",
        )  # fmt: skip
    exchange = _Exchange()
    spoken = answered = False
    for number, text in _lines(file):
        if not text.strip():
            if exchange.said and exchange.said[-1][0].lower() in names:
                yield exchange.start, _conversation(exchange, names)
                exchange = _Exchange()
            continue
        if NARRATION.match(text):
            continue
        match = SPOKEN.match(text)
        if match is not None:
            speaker = DIRECTION.sub("", match["speaker"]).strip()
            spoken, answered = True, answered or speaker.lower() in names
            exchange.add(speaker, match["line"], number)
        elif exchange.said:
            exchange.said[-1][1].append(text.strip())
        else:
            yield _not_spoken(file, number)
    if any(speaker.lower() in names for speaker, _ in exchange.said):
        yield exchange.start, _conversation(exchange, names)
    elif exchange.said and answered:
        yield bad_record("SCRIPT_UNANSWERED", file.name, exchange.start, "nobody answers the last lines of the script.",
                         "Remove them, or write the answer")  # fmt: skip
    if spoken and not answered:
        yield bad_record("CHARACTER_SILENT", file.name, 0, "the character says nothing in this script.",
                         "Check `character` and its aliases")  # fmt: skip


def _lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    with open_text(file, "\n") as lines:
        yield from enumerate((line.removesuffix("\n") for line in lines), start=1)


def _conversation(exchange: _Exchange, names: frozenset[str]) -> Conversation:
    notes: list[str] = []
    while exchange.said[-1][0].lower() not in names:
        exchange.said.pop()
        notes.append("unanswered_turn_dropped")
    others = {speaker for speaker, _ in exchange.said if speaker.lower() not in names}
    turns: list[tuple[str, str]] = []
    for speaker, lines in exchange.said:
        text = "\n".join(line for line in lines if line)
        role = "assistant" if speaker.lower() in names else "user"
        if role == "user" and len(others) > 1:
            text = f"{speaker}: {text}"  # With several others present, who asks is part of the question.
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n{text}")
        else:
            turns.append((role, text))
    asked = turns[0][1] if turns[0][0] == "user" else ""
    return Conversation("script", asked, turns, notes=notes)


def _not_spoken(file: SourceFile, number: int) -> LoralineError:
    return bad_record("SHAPE_UNKNOWN", file.name, number, "the line names no speaker.",
                      "Write `speaker: line`, and narration in parentheses")  # fmt: skip
