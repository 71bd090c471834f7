"""Token ids to text while they come: whole characters only, stop texts cut off."""

from __future__ import annotations

from loraline.inference.engines.chat_format import ChatFormat

_HELD = "\ufffd"
"""What decoders show for a character whose bytes are not complete yet."""
_CONTEXT = 8
"""Ids decoded again before the new ones: enough for any joining rule of a tokenizer."""


class TextStream:
    """Turns the ids of one answer into text pieces."""

    def __init__(self, chat_format: ChatFormat, stop: tuple[str, ...] = ()):
        self._format = chat_format
        self._stop = tuple(text for text in stop if text)
        self._hold = max((len(text) - 1 for text in self._stop), default=0)
        self._ids: list[int] = []
        self._read = 0
        self._pending = ""
        """Text decoded but not yet given out: it may be the beginning of a stop text."""

    def push(self, token: int) -> tuple[str, bool]:
        """Add an id; return the text that is certain now, and whether a stop text ended the answer."""
        self._ids.append(token)
        new = self._new_text(final=False)
        self._pending += new
        position = min((at for text in self._stop if (at := self._pending.find(text)) >= 0), default=-1)
        if position >= 0:
            given, self._pending = self._pending[:position], ""
            return given, True
        cut = len(self._pending) - self._held_back()
        given, self._pending = self._pending[:cut], self._pending[cut:]
        return given, False

    def finish(self) -> str:
        """Return what was held back, at the end of an answer that no stop text ended."""
        given, self._pending = self._pending + self._new_text(final=True), ""
        return given

    def _held_back(self) -> int:
        """Return how many characters at the end may still become a stop text."""
        for size in range(min(self._hold, len(self._pending)), 0, -1):
            tail = self._pending[-size:]
            if any(text.startswith(tail) for text in self._stop):
                return size
        return 0

    def _new_text(self, *, final: bool) -> str:
        start = max(0, self._read - _CONTEXT)
        before = self._format.decode(self._ids[start : self._read])
        after = self._format.decode(self._ids[start:])
        if after.endswith(_HELD) and not final and len(self._ids) - self._read < _CONTEXT:
            return ""
        self._read = len(self._ids)
        return after[len(before) :]
