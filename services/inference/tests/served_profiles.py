"""A toy with a window for long prompts, and response profiles of our own beside the built-in ones."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_toy import Served

from loraline.inference.language.rules import rule_of

MINI = """
name: mini
description: A word and up to three boats, all in short Korean.
system_prompt: Short.
input:
  fields:
    harbour: {label: Harbour, required: true, max_length: 20}
    weather: {choices: [calm, storm]}
answer:
  type: object
  additionalProperties: false
  required: [word, boats]
  properties:
    word: {type: string, minLength: 1, maxLength: 3}
    boats:
      type: array
      minItems: 2
      maxItems: 3
      items:
        type: object
        additionalProperties: false
        required: [name]
        properties: {name: {type: string, minLength: 1, maxLength: 4}}
language: {answer: ko, forbid: [latin, digits, emoji, markdown, symbols]}
stream: {field: boats, event: boat}
sampling: {max_tokens: 160, temperature: 1.0}
"""
SLOW = """
name: slow
description: Many boats, one after the other.
answer:
  type: object
  additionalProperties: false
  required: [boats]
  properties:
    boats: {type: array, minItems: 300, maxItems: 300, items: {type: string, minLength: 2, maxLength: 2}}
language: {answer: en}
stream: {field: boats, event: boat}
sampling: {max_tokens: 2000, temperature: 1.0}
"""


def write_profiles(folder: Path) -> Path:
    """Write the profiles and return their folder."""
    folder.mkdir()
    (folder / "mini.yaml").write_text(MINI, encoding="utf-8")
    (folder / "slow.yml").write_text(SLOW, encoding="utf-8")
    return folder


def widened(model: Path, folder: Path, window: int = 4096) -> Path:
    """Copy a model with a wider context window."""
    shutil.copytree(model, folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": window}))
    return folder


def client(served: Served, key: str = "anna", **headers: str) -> httpx.AsyncClient:
    """Return a client of the HTTP side with a key."""
    return httpx.AsyncClient(
        base_url=f"{served.http}/v1", headers={"authorization": f"Bearer {served.keys[key]}", **headers}, timeout=300
    )


def events_of(text: str) -> list[tuple[str, str, Any]]:
    """Return (id, event, data) of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


def spoken(text: str, language: str, *forbid: str) -> bool:
    """Tell whether a text keeps to a language."""
    rule = rule_of(language, forbid, "")
    return rule is not None and rule.problem(text) == ""


async def curl(served: Served, *arguments: str, key: str = "anna") -> str:
    """Run curl and return the raw bytes that came, as text."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sS", "-N", "--max-time", "200", "-H", f"authorization: Bearer {served.keys[key]}"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return output.decode()


def prompts_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the prompts that the engine is given, as text with their control tokens."""
    serving = served.component.extra["host"].serving()
    told: list[str] = []
    generate: Callable[[Any], Any] = serving.engine.generate

    def recorded(request: Any) -> Any:
        told.append(serving.chat_format.tokenizer.decode(request.prompt_ids))
        return generate(request)

    monkeypatch.setattr(serving.engine, "generate", recorded)
    return told
