"""The items of one array in a JSON object, each as soon as it is complete."""

from __future__ import annotations

import json
from typing import Any


class ItemScanner:
    """Reads an object's text piece by piece, as it is generated, and finds the items of one of its arrays."""

    def __init__(self, field: str):
        self._field = field
        self._depth = 0
        self._in_string = self._escaped = False
        self._text: list[str] = []
        """The key, or the item, that is being read."""
        self._key = ""
        self._of_value = False
        """Whether the object's next text at depth 1 is a value, not a key."""
        self._inside = False

    def feed(self, text: str) -> list[Any]:
        """Take the next piece; return the items that it completed."""
        found: list[Any] = []
        for character in text:
            self._take(character, found)
        return found

    def _take(self, character: str, found: list[Any]) -> None:
        if self._in_string:
            self._text.append(character)
            self._within_string(character)
            return
        if self._inside and self._depth == 2 and character in ",]":
            self._complete(found)
            self._inside = character == ","
            self._depth -= character == "]"
            return
        if character == '"':
            self._in_string = True
            if not self._inside:
                self._text.clear()
        if character in "[{":
            self._open(character)
            return
        if character in "]}":
            self._depth -= 1
        elif self._depth == 1 and character in ":,":
            self._of_value = character == ":"
        if self._inside or character == '"':
            self._text.append(character)

    def _within_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1 and not self._of_value:
                self._key = json.loads("".join(self._text))

    def _open(self, character: str) -> None:
        self._depth += 1
        if self._inside:
            self._text.append(character)
        elif self._depth == 2 and character == "[" and self._of_value and self._key == self._field:
            self._inside = True
            self._text.clear()

    def _complete(self, found: list[Any]) -> None:
        text = "".join(self._text).strip()
        self._text.clear()
        if text:
            found.append(json.loads(text))
