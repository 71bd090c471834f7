"""The pieces of a SentencePiece model, read from its file alone: their places are the token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 64 * 1024 * 1024
"""The largest models of today are a tenth of this."""
_PIECES, _TEXT = 1, 1
"""Numbers of the fields that are read: ModelProto.pieces, and SentencePiece.piece within it."""
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
"""Kinds of fields on the wire; protobuf has no other that SentencePiece uses."""


def piece_ids(path: Path) -> dict[str, int]:
    """Return piece -> id; empty where there is no such file, or another kind of file under the name (tiktoken).

    Reads the two fields that are needed, so that ids can be checked where the sentencepiece library is not installed.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return {}
    ids: dict[str, int] = {}
    try:
        for number, content in enumerate(_fields(memoryview(path.read_bytes()), _PIECES)):
            ids[bytes(next(_fields(content, _TEXT))).decode()] = number
    except (ValueError, IndexError, StopIteration):  # UnicodeDecodeError is a ValueError
        return {}
    return ids


def _fields(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Yield the contents of all length-delimited fields with this number."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            at += 8 if kind == _EIGHT_BYTES else 4
        elif kind == _LENGTH:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than the file")
            if key >> 3 == wanted:
                yield data[at : at + size]
            at += size
        else:
            raise ValueError(f"there are no fields of kind {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number has more than 64 bits")
