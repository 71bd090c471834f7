"""Text files as people save them, read piece by piece: UTF-8 with or without BOM, or UTF-16 with BOM."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from loraline.core.errors import LoralineError
from loraline.datagen.convert.files import SourceFile
from loraline.datagen.convert.problems import bad_record

_PIECE = 1 << 20


@contextmanager
def open_text(file: SourceFile, newline: str) -> Iterator[TextIO]:
    """Open a file for reading, after making sure that all of it can be decoded; `newline` as for open().

    A file in another encoding must not give rows before it fails: half a file would be taken for a whole one.
    """
    try:
        encoding = _check(file)
        text = file.path.open(encoding=encoding, newline=newline)
    except OSError as error:
        raise bad_record(
            "FILE_UNREADABLE", file.name, 0, f"the file cannot be read: {error.strerror}.", "Mend its permissions"
        ) from error
    with text:
        yield text


def _check(file: SourceFile) -> str:
    """Return the encoding; the error for a file in another one names the first line that cannot be decoded."""
    with file.path.open("rb") as raw:
        piece = raw.read(_PIECE)
        encoding = "utf-16" if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        decoder = codecs.getincrementaldecoder(encoding)()
        line = 1
        while True:
            try:
                line += decoder.decode(piece, final=not piece).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _wrong_encoding(file, line, encoding) from error
            if not piece:
                return encoding
            piece = raw.read(_PIECE)


def _wrong_encoding(file: SourceFile, line: int, encoding: str) -> LoralineError:
    return bad_record(
        "FILE_ENCODING", file.name, line, f"the text is not {encoding.removesuffix('-sig').upper()}.",
        "Save the file as UTF-8 (from GB18030, say: iconv -f GB18030 -t UTF-8)",
    )  # fmt: skip
