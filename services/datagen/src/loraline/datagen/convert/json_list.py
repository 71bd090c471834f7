"""Elements of a JSON list one at a time, for files that are too large to be held whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

PIECE = 1 << 20
LARGEST_ELEMENT = 64 << 20
"""Characters of one element; what is longer is taken for broken rather than read to the end of the file."""
_BLANK = " \t\r\n"
_NUMBER_END = re.compile(r"[^-+.0-9A-Za-z]")


class JsonListReader:
    """Reads `[a, b, …]`; memory holds one element and the piece of text around it."""

    def __init__(self, text: TextIO):
        self._text = text
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1  # of the buffer's first character
        self._ended = False

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Yield each element with the line it begins on.

        json.JSONDecodeError, whose lineno is the file's, for what is no JSON list; RecursionError for one nested too
        deeply.
        """
        self._expect("[")
        if self._peek() == "]":
            self._at += 1
        else:
            while True:
                self._peek()
                yield self._here(), self._element()
                if self._peek() == "]":
                    self._at += 1
                    break
                self._expect(",")
        if self._peek():
            raise self._error("Extra data")

    def _element(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._ended or len(self._buffer) - self._at > LARGEST_ELEMENT:
                    raise self._error(error.msg, error.pos) from None
            else:
                # A number may go on in the next piece: "1" of "1.5", and "1." too.
                if self._ended or not isinstance(value, int | float) or _NUMBER_END.search(self._buffer, end):
                    self._at = end
                    return value
            self._more()

    def _peek(self) -> str:
        """Return the next character that is not blank, or nothing at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _BLANK:
                    return self._buffer[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise self._error(f"Expecting '{mark}'")
        self._at += 1

    def _more(self) -> None:
        """Read on, as much as is waiting already, so that a long element is not decoded again and again."""
        self._line += self._buffer.count("\n", 0, self._at)
        waiting = self._buffer[self._at :]
        piece = self._text.read(max(PIECE, len(waiting)))
        self._ended = not piece
        self._buffer, self._at = waiting + piece, 0

    def _here(self) -> int:
        return self._line + self._buffer.count("\n", 0, self._at)

    def _error(self, message: str, position: int | None = None) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self._buffer, self._at if position is None else position)
        error.lineno += self._line - 1
        return error
