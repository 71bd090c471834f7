"""Counters and gauges of a job's process on their way to the metrics of the service that runs it.

The child adds up what it counts and writes it as lines of JSON into a pipe, twice a second and once at its end; the
supervisor reads the pipe whenever it looks after the child and hands each line to its observer. Nothing waits for
anything: a full pipe keeps the sums in the child until the next try, a killed child loses half a second of counts.
Lines of the child's log that belong into the service's travel the same way.
"""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

_FLUSH_SECONDS = 0.5
_LONGEST_LINE = 1 << 20
_MOST_REMARKS = 1000

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name and its labels, sorted by name."""


@dataclass(frozen=True)
class Telemetry:
    """What a job counted since it last told, and its gauges as they are now."""

    counts: dict[Series, float] = field(default_factory=dict)
    gauges: dict[Series, float] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """Return the figures as one line."""
        told = [[[name, dict(labels), value] for (name, labels), value in part.items()]
                for part in (self.counts, self.gauges)]  # fmt: skip
        return json.dumps(told, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Telemetry:
        """Read a line that to_line wrote; ValueError when it is none."""
        try:
            counts, gauges = json.loads(line)
            return cls(*({series(str(name), labels): float(value) for name, labels, value in part}
                         for part in (counts, gauges)))  # fmt: skip
        except (TypeError, AttributeError) as error:
            raise ValueError("not a line of figures") from error


def series(name: str, labels: dict[str, Any]) -> Series:
    """Return the key of a series."""
    return name, tuple(sorted((key, str(value)) for key, value in labels.items()))


class TelemetryWriter:
    """The child's end of the pipe; its methods may be called from any thread and never block."""

    def __init__(self, descriptor: int):
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._counts: defaultdict[Series, float] = defaultdict(float)
        self._gauges: dict[Series, float] = {}
        self._remarks: deque[bytes] = deque(maxlen=_MOST_REMARKS)
        self._unsent = b""
        self._timer: threading.Timer | None = None

    def count(self, name: str, amount: float, labels: dict[str, Any]) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[series(name, labels)] += amount
            self._flush_soon()

    def gauge(self, name: str, value: float, labels: dict[str, Any]) -> None:
        """Set a gauge; it stands until the job's process ends."""
        with self._lock:
            self._gauges[series(name, labels)] = value
            self._flush_soon()

    def remark(self, fields: dict[str, Any]) -> None:
        """Tell a line of the log; of a flood the newest lines stay."""
        with self._lock:
            self._remarks.append(json.dumps(fields, separators=(",", ":"), default=str).encode() + b"\n")
            self._flush_soon()

    def _flush_soon(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(_FLUSH_SECONDS, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Write what was counted, as far as the pipe takes it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            if not self._unsent and (self._counts or self._gauges):
                self._unsent = Telemetry(dict(self._counts), dict(self._gauges)).to_line()
                self._counts.clear()
                self._gauges.clear()
            try:
                while self._unsent or self._remarks:
                    self._unsent = self._unsent or self._remarks.popleft()
                    self._unsent = self._unsent[os.write(self._descriptor, self._unsent) :]
            except BlockingIOError:
                self._flush_soon()
            except OSError:  # the service is gone; the child will be soon
                self._unsent = b""


class TelemetryPipe:
    """The supervisor's end of the pipe."""

    def __init__(self) -> None:
        self._read, self.child_end = os.pipe()
        os.set_blocking(self._read, False)
        self._rest = b""
        self._remarks: list[dict[str, Any]] = []

    def close_child_end(self) -> None:
        """Close the descriptor that the child has a copy of by now."""
        if self.child_end >= 0:
            os.close(self.child_end)
            self.child_end = -1

    def take(self) -> list[Telemetry]:
        """Return what has come since the last call; lines that make no sense are passed over."""
        while True:
            try:
                piece = os.read(self._read, 65536)
            except BlockingIOError:
                break
            if not piece:
                break
            self._rest += piece
            if len(self._rest) > _LONGEST_LINE and b"\n" not in self._rest:
                self._rest = b""  # not a line of ours
        *lines, self._rest = self._rest.split(b"\n")
        self._remarks += [told for line in lines if (told := _remark(line))]
        return [told for line in lines if (told := _parsed(line)) is not None]

    def take_remarks(self) -> list[dict[str, Any]]:
        """Return the lines of the log among what `take` has read."""
        remarks, self._remarks = self._remarks, []
        return remarks

    def close(self) -> None:
        """Close both ends."""
        self.close_child_end()
        os.close(self._read)


def _remark(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _parsed(line: bytes) -> Telemetry | None:
    try:
        return Telemetry.from_line(line)
    except ValueError:
        return None
