"""One reader for each file type: a file in, raw records with their line numbers out.

A reader yields errors instead of raising them where reading can go on after the bad place: whether one bad record
ends the job is for the caller to say.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loraline.core.errors import LoralineError
from loraline.datagen.convert.files import SourceFile
from loraline.datagen.convert.problems import bad_record

csv.field_size_limit(64 * 1024 * 1024)


@dataclass(slots=True)
class RawRecord:
    """One record as the file has it. `line` is where it begins, counted from 1 (in parquet: the row)."""

    line: int
    data: Any


Records = Iterator[RawRecord | LoralineError]


def read_text(file: SourceFile) -> str:
    """Return a file's text: UTF-8 with or without BOM, or UTF-16 with BOM; line ends as they are."""
    try:
        raw = file.path.read_bytes()
    except OSError as error:
        raise bad_record(
            "FILE_UNREADABLE", file.name, 0, f"the file cannot be read: {error.strerror}.", "Mend its permissions"
        ) from error
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise bad_record(
            "FILE_ENCODING", file.name, line, f"the text is not {encoding.removesuffix('-sig').upper()}.",
            "Save the file as UTF-8 (from GB18030, say: iconv -f GB18030 -t UTF-8)",
        ) from error  # fmt: skip


def read_json(file: SourceFile) -> Records:
    """Read a list of records, an object that wraps such a list, an object of key: text, or one record."""
    text = read_text(file)
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        yield _broken_json(file, error, getattr(error, "lineno", 0))
        return
    if isinstance(document, list):
        yield from (RawRecord(line, record) for line, record in zip(_element_lines(text), document, strict=True))
        return
    if isinstance(document, dict):
        yield from _from_object(document)
        return
    yield bad_record("SHAPE_UNKNOWN", file.name, 1, "the file holds neither a list nor an object.",
                     "Bring a list of records")  # fmt: skip


def _from_object(document: dict[str, Any]) -> Records:
    lists = [value for value in document.values() if isinstance(value, list)]
    wraps = len(lists) == 1 and lists[0] and all(isinstance(item, dict) for item in lists[0])
    one_conversation = {"messages", "conversations", "conversation"} & document.keys()
    if wraps and not one_conversation:
        yield from (RawRecord(number, record) for number, record in enumerate(lists[0], start=1))
    elif document and all(isinstance(v, str) for v in document.values()) and not _known_fields(document):
        yield from (RawRecord(n, {"key": k, "value": v}) for n, (k, v) in enumerate(document.items(), start=1))
    else:
        yield RawRecord(1, document)


def _known_fields(document: dict[str, Any]) -> bool:
    from loraline.datagen.convert.shapes import recognise  # the shapes know the names; readers only ask

    return recognise(document) is not None


def _element_lines(text: str) -> list[int]:
    """Return the line on which each element of a JSON list begins; `text` is known to be valid."""
    decoder = json.JSONDecoder()
    lines, line, at = [], 1, 0
    position = text.index("[") + 1
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return lines
        line += text.count("\n", at, position)
        at = position
        lines.append(line)
        _, position = decoder.raw_decode(text, position)


def _broken_json(file: SourceFile, error: Exception, line: int) -> LoralineError:
    what = "nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))
    return bad_record("JSON_INVALID", file.name, line, f"this is not valid JSON: {what}.", "Mend the file")


def read_jsonl(file: SourceFile) -> Records:
    """Read one JSON value a line; blank lines do not count as records."""
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield RawRecord(number, json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            yield _broken_json(file, error, number)


def read_csv(file: SourceFile) -> Records:
    """Read a table with a header; two columns without known names are taken as question and answer."""
    text = read_text(file)
    delimiter = _delimiter(text, file.path.suffix.lower())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            started, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header, is_data = _header(cells)
                if not is_data:
                    continue
            yield _table_record(file, header, cells, started)
    except csv.Error as error:
        yield bad_record("CSV_INVALID", file.name, reader.line_num, f"this is not valid CSV: {error}.",
                         "Close the quotation marks there")  # fmt: skip


def _delimiter(text: str, suffix: str) -> str:
    if suffix == ".tsv":
        return "\t"
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(",;\t|", key=lambda candidate: (first.count(candidate), candidate == ","))


def _header(cells: list[str]) -> tuple[list[str], bool]:
    """Return the column names, and whether this first line is a record itself."""
    names = [cell.strip() for cell in cells]
    if _known_fields(dict.fromkeys(names, "x")):
        return names, False
    titles = all(name and len(name) <= 32 and not any(mark in name for mark in "?!.,;？！。，；：:") for name in names)
    if len(names) == 2:
        return ["first_column", "second_column"], not titles
    return names, False


def _table_record(file: SourceFile, header: list[str], cells: list[str], line: int) -> RawRecord | LoralineError:
    extra = [cell for cell in cells[len(header) :] if cell.strip()]
    if extra:
        return bad_record(
            "CSV_COLUMNS", file.name, line, f"the row has {len(cells)} cells where the header has {len(header)}.",
            "Put quotation marks around cells with commas",
        )  # fmt: skip
    return RawRecord(line, dict(zip(header, cells, strict=False)))


def read_parquet(file: SourceFile) -> Records:
    """Read a parquet table; needs pyarrow (`loraline-datagen[parquet]`)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise bad_record("PARQUET_NEEDS_PYARROW", file.name, 0, "reading parquet needs pyarrow, which is missing.",
                         "Install loraline-datagen[parquet]") from error  # fmt: skip
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for data in batch.to_pylist():
                    number += 1
                    yield RawRecord(number, data)
    except (OSError, pyarrow.ArrowException) as error:
        yield bad_record("PARQUET_INVALID", file.name, number, f"the table cannot be read: {error}.", "Mend the file")


READERS: dict[str, Callable[[SourceFile], Records]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
