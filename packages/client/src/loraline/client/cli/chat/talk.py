"""One talk: whom it is with, what was said, how it shall be answered, and how it is saved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import yaml

from loraline.client.errors import LoralineApiError
from loraline.client.resources.inference import Answer

Turn = dict[str, str]


@dataclass
class Talk:
    """A talk with one model, and how it shall answer."""

    model: str
    system: str = ""
    temperature: float | None = None
    max_tokens: int = 0
    """0 for the server's default."""
    seed: int | None = None
    json_only: bool = False
    language: str = ""
    """`ko`, `zh`, `en`, `question`, or empty for no rule."""
    session: str = ""
    """Session on the server that keeps the turns; empty where they are kept here."""
    turns: list[Turn] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the talk's answers are shown under."""
        return self.model or "base"

    def messages(self, question: str) -> list[Turn]:
        """Return what is sent: all turns with the new one, or only that where a session keeps the others."""
        asked = {"role": "user", "content": question}
        return [asked] if self.session else [*self._system(), *self.turns, asked]

    def remember(self, question: str, answer: Answer) -> None:
        """Keep a turn; an empty answer is kept out, because models continue emptiness."""
        if answer.text:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]

    def save(self, file: Path) -> str:
        """Write the talk and say how: a row is added to a .jsonl, as datagen reads it; another file is made anew."""
        if not self.turns:
            raise _bad("NOTHING_TO_SAVE", "Nothing was said yet, so there is nothing to save.")
        messages = [*self._system(), *self.turns]
        try:
            if file.suffix == ".jsonl":
                with file.open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                return f"one row added to {file}"
            with file.open("x", encoding="utf-8") as text:
                text.write("\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages) + "\n")
            return f"saved in {file}"
        except FileExistsError:
            raise _bad("FILE_EXISTS", f"{file} exists; take another name, or one that ends in .jsonl.") from None
        except OSError as error:
            raise _bad("CANNOT_SAVE", f"{file} cannot be written: {error.strerror or error}.") from error

    def _system(self) -> list[Turn]:
        return [{"role": "system", "content": self.system}] if self.system else []


def character_prompt(character: str) -> str:
    """Return the system prompt of a character: a file's (its text, or `system` of YAML or JSON), else one made of a
    name."""
    file = Path(character).expanduser()
    if file.suffix not in {".txt", ".md", ".yaml", ".yml", ".json"}:
        return f"You are {character}. Stay in character, and answer in the language of the question."
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix in {".txt", ".md"}:
            return text.strip()
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad("CHARACTER_UNREADABLE", f"The character in {file} cannot be read: {error}") from error
    system = content.get("system") if isinstance(content, dict) else None
    if not isinstance(system, str) or not system.strip():
        raise _bad("CHARACTER_UNREADABLE", f"{file} has no text under `system`, which says who the character is.")
    return system.strip()


def _bad(reason: str, message: str) -> LoralineApiError:
    return LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
