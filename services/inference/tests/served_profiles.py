"""A toy with a window for long prompts, and response profiles of our own beside the built-in ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
