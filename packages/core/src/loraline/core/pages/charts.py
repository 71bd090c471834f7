"""Line charts as SVG that takes the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 26, 34
_COLOURS = ("--a", "--b", "--c", "--d")


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """x and y in ascending x; values that are not finite leave a gap."""


def line_chart(lines: Sequence[Line], *, x_label: str, title: str) -> str:
    """Return the chart; at most four lines. Empty when no value is finite."""
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    # Where the values are not finite the axis goes on: a run that diverged half-way shows how far it went.
    across_all = [x for line in lines for x, _ in line.points if math.isfinite(x)]
    x_low, x_high = min(across_all), max(across_all)
    y_ticks = ticks(min(0.0, *(y for _, y in finite)), max(y for _, y in finite))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [_y_axis(y, place(x_low, y)[1]) for y in y_ticks]
    for x in [tick for tick in ticks(x_low, x_high) if x_low <= tick <= x_high]:
        across = place(x, y_low)[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_text(x)}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    for number, line in enumerate(lines[: len(_COLOURS)]):
        parts.extend(_drawn(line, _COLOURS[number], place))
        parts.append(_legend(line.name, _COLOURS[number], number))
    label = escape(title, quote=True)
    return f'<svg class="lines" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    begin, end = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(begin, max(end, begin + 1) + 1)]


def _y_axis(value: float, height: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{_text(value)}</text>'
    )


def _drawn(line: Line, colour: str, place) -> list[str]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if math.isfinite(y):
            pieces[-1].append(place(x, y))
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in pieces:
        if len(piece) == 1:
            drawn.append(f'<circle cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="2.5" fill="var({colour})"/>')
        elif piece:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            drawn.append(f'<polyline points="{points}" stroke="var({colour})"/>')
    return drawn


def _legend(name: str, colour: str, number: int) -> str:
    left = _LEFT + number * 160
    return (
        f'<line x1="{left}" x2="{left + 18}" y1="10" y2="10" stroke="var({colour})" stroke-width="3"/>'
        f'<text x="{left + 24}" y="14">{escape(name)}</text>'
    )


def _text(value: float) -> str:
    return f"{value:.6g}"
