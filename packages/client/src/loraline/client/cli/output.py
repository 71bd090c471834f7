"""How the command speaks: tables and colours on a terminal, plain lines in a pipe, JSON when asked for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from google.protobuf.timestamp_pb2 import Timestamp
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loraline.client.cli.plaindata import as_data

Format = Literal["auto", "json"]
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
PIPE_WIDTH = 100_000
"""Width of a line in a pipe: nothing is wrapped for a program that reads."""


class Output:
    """Where and how a command writes."""

    def __init__(self, form: Format = "auto", quiet: bool = False):
        self.form = form
        self.quiet = quiet
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)

    @property
    def json(self) -> bool:
        """Whether JSON was asked for."""
        return self.form == "json"

    @property
    def terminal(self) -> bool:
        """Whether a person looks at standard output."""
        return self.out.is_terminal and not self.json

    def data(self, value: Any) -> None:
        """Write one JSON value on a line."""
        sys.stdout.write(json.dumps(as_data(value), ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def say(self, text: str, style: str = "") -> None:
        """Write a line for people; nothing with --quiet or in JSON."""
        if not self.quiet and not self.json:
            self.line(text, style)

    def line(self, text: str, style: str = "") -> None:
        """Write a line of the result itself."""
        self.out.print(Text(clean(text), style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write a warning to standard error."""
        self.err.print(Text.assemble(("warning: ", "yellow"), clean(text)), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "nothing found") -> None:
        """Write a table: with headings on both, ruled on a terminal, aligned by blanks in a pipe."""
        if not rows:
            self.say(empty, "dim")
        elif self.terminal:
            self.out.print(_ruled(columns, rows))
        else:
            for row in _aligned([[column.upper() for column in columns], *rows]):
                self.line(row)

    def pairs(self, entries: Sequence[tuple[str, str]]) -> None:
        """Write names and values, one pair a line; entries without a value are left out."""
        shown = [(name, value) for name, value in entries if value]
        width = max((cell_len(name) for name, _ in shown), default=0)
        for name, value in shown:
            first, *rest = clean(value).split("\n")
            self.out.print(Text.assemble((f"{name:<{width}}  ", "bold cyan"), first), soft_wrap=True)
            for line in rest:
                self.out.print(Text(" " * (width + 2) + line), soft_wrap=True)


def _console(stream: Any) -> Console:
    """Return a console that never writes control characters into a pipe, whatever the environment says."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, color_system=None, force_terminal=False, width=PIPE_WIDTH)


def clean(text: str) -> str:
    """Return text without control characters: what a model or a file says must not steer a terminal."""
    return "".join(char for char in _SEQUENCE.sub("", text) if char in "\n\t" or not _control(ord(char)))


def _control(code: int) -> bool:
    bidi = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return code < 0x20 or 0x7F <= code <= 0x9F or bidi


def _ruled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold cyan", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(clean(cell)) for cell in row))
    return table


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def size_text(count: int) -> str:
    """Return a number of bytes as people read it."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def age_text(time: Timestamp, now: datetime | None = None) -> str:
    """Return how long ago a time was; a dash for an unset one."""
    if not time.seconds:
        return "-"
    seconds = ((now or datetime.now(UTC)) - time.ToDatetime(tzinfo=UTC)).total_seconds()
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) // size:.0f} {unit} ago"
    return f"{seconds // 86400:.0f} d ago"
