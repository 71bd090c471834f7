"""One reader for each file type: a file in, raw records with their line numbers out.

A reader yields errors instead of raising them where reading can go on after the bad place: whether one bad record
ends the job is for the caller to say.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from loraline.core.errors import LoralineError
from loraline.datagen.convert.files import SourceFile
from loraline.datagen.convert.json_list import JsonListReader
from loraline.datagen.convert.problems import bad_record
from loraline.datagen.convert.text import open_text

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

csv.field_size_limit(64 * 1024 * 1024)
STREAM_BYTES = 8 * 1024 * 1024


@dataclass(slots=True)
class RawRecord:
    """One record as the file has it. `line` is where it begins, counted from 1 (in parquet: the row)."""

    line: int
    data: Any


Records = Iterator[RawRecord | LoralineError]


def read_json(file: SourceFile) -> Records:
    """Read a list of records, an object that wraps such a list, an object of key: text, or one record.

    A list of more than STREAM_BYTES is read element by element: then the records before a break come before its error.
    """
    with open_text(file, "") as opened:
        if file.path.stat().st_size > STREAM_BYTES and _begins_list(opened):
            yield from _read_long_list(file, opened)
            return
        text = opened.read()
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


def _begins_list(text: TextIO) -> bool:
    begin = text.read(4096).lstrip()
    text.seek(0)
    return begin.startswith("[")


def _read_long_list(file: SourceFile, text: TextIO) -> Records:
    try:
        yield from (RawRecord(line, record) for line, record in JsonListReader(text).elements())
    except (json.JSONDecodeError, RecursionError) as error:
        yield _broken_json(file, error, getattr(error, "lineno", 0))


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
    # Lines end at \n only: U+2028 and its like may stand inside a JSON string.
    with open_text(file, "\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield RawRecord(number, json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                yield _broken_json(file, error, number)


def read_csv(file: SourceFile) -> Records:
    """Read a table with a header; two columns without known names are taken as question and answer."""
    with open_text(file, "") as text:
        delimiter = _delimiter(text, file.path.suffix.lower())
        text.seek(0)
        yield from _table(file, csv.reader(text, delimiter=delimiter, strict=True))


def _table(file: SourceFile, reader: CsvReader) -> Records:
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


def _delimiter(text: TextIO, suffix: str) -> str:
    if suffix == ".tsv":
        return "\t"
    first = next((line for line in text if line.strip()), "")
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
