"""System prompts that the operator sets by model name, for conversations that bring none, and what lacks one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import yaml

from loraline.core.errors import invalid_argument
from loraline.inference.question import Question
from loraline.inference.serving import Target

_MOST_BYTES = 1024 * 1024


class SystemPrompts:
    """Model name -> text, read once at the server's start."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts = dict(texts)

    @classmethod
    def load(cls, path: Path | None) -> SystemPrompts:
        """Read a YAML mapping of names to texts; without a file there are none.

        INVALID_ARGUMENT SYSTEM_PROMPTS_INVALID names the file and what is wrong with it.
        """
        if path is None:
            return cls({})
        try:
            if path.stat().st_size > _MOST_BYTES:
                _refuse(path, f"it is larger than {_MOST_BYTES} bytes")
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            _refuse(path, f"it cannot be read: {error}")
        except (yaml.YAMLError, RecursionError) as error:
            _refuse(path, f"it is no YAML: {' '.join(str(error).split())}")
        if not isinstance(content, Mapping):
            _refuse(path, "it must hold one mapping of model names to texts")
        for name, text in content.items():
            if not (isinstance(name, str) and name and isinstance(text, str) and text.strip()):
                _refuse(path, f"{name!r} must be a model name with a text that is not empty")
        return cls(content)

    def lead_for(self, question: Question, target: Target) -> tuple[list[dict[str, str]], list[str]]:
        """Return the system message to put before a conversation that has none, and what its caller should know.

        The nearest name counts: the alias that was asked, then the name with its version, then without.
        """
        if not question.messages or question.lead or any(one["role"] == "system" for one in question.messages):
            return [], []
        asked = question.model.removeprefix("adapter/")
        for name in (asked if "@" in asked else "", target.name, target.name.partition(":")[0]):
            if name in self._texts:
                return [{"role": "system", "content": self._texts[name]}], []
        if not target.wants_system:
            return [], []
        return [], [
            f"{target.name} was trained with a system prompt and this conversation has none: its answers may be unlike "
            "those in training. Send the one it was trained with."
        ]


def _refuse(path: Path, why: str) -> NoReturn:
    message = f"The system prompts in {path.name}: {why.rstrip('.')}. Mend the file and start again."
    raise invalid_argument("SYSTEM_PROMPTS_INVALID", message, system_prompts_file=why)
