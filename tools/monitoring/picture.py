"""Draws a dashboard's panels from what Prometheus has: for people who want to see it before they start anything."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from panels import Board, Panel
from prometheus_api import Line, PrometheusApi
from queries import fill_in

matplotlib.use("Agg")
_BACK, _CARD, _TEXT, _FAINT = "#111217", "#181b1f", "#ccccdc", "#8e8e9a"
_COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d")
_LEGENDS = 5
_TABLE_ROWS = 8


def draw(board: Board, prometheus: PrometheusApi, start: float, end: float, file: Path, rows: list[str]) -> list[str]:
    """Write a PNG of these rows of a dashboard, laid out as Grafana does.

    Returns the titles of panels that had nothing to show and do not need a GPU.
    """
    placed = list(_places(board, rows))
    height = max(y + panel.height for panel, _, y in placed)
    figure = Figure(figsize=(15, height * 0.34 + 0.6), facecolor=_BACK)
    top = 1 - 0.55 / (height * 0.34 + 0.6)
    figure.text(
        0.008, 1 - 0.3 / (height * 0.34 + 0.6), board.title, color=_TEXT, fontsize=14, va="center", weight="bold"
    )
    empty: list[str] = []
    for panel, x, y in placed:
        width, tall = panel.width / 24, panel.height / height * top
        left, bottom = x / 24, top - (y + panel.height) / height * top
        card = figure.add_axes((left + 0.002, bottom + 0.003, width - 0.004, tall - 0.006), facecolor=_CARD)
        card.set_xticks([])
        card.set_yticks([])
        for edge in card.spines.values():
            edge.set_color("#24262b")
        card.text(0.012 if panel.width > 8 else 0.02, 0.97, panel.title, transform=card.transAxes, color=_TEXT,
                  fontsize=8.5, va="top", weight="bold")  # fmt: skip
        lines: dict[str, Line] = {}
        for legend, query in panel.queries.items():
            for line in prometheus.over(fill_in(query), start, end, max(1.0, (end - start) / 240)):
                lines[_named(legend, line)] = line
        if not lines and not panel.needs:
            empty.append(panel.title)
        if panel.kind == "stat":
            _stat(card, panel, lines)
        elif panel.kind == "table":
            _table(card, panel, lines)
        else:
            inches = height * 0.34 + 0.6
            legend = (0.3 + 0.17 * min(3, -(-min(len(lines), _LEGENDS) // 2))) / inches
            inner = (left + 0.037, bottom + legend, width - 0.047, tall - legend - 0.36 / inches)
            _graph(figure.add_axes(inner, facecolor=_CARD), panel, lines)
    figure.savefig(file, dpi=100, facecolor=_BACK, pil_kwargs={"optimize": True})
    return empty


def _places(board: Board, rows: list[str]) -> Any:
    """Yield panels with their column and row on a grid of 24 columns."""
    y = 0
    for heading in rows:
        x = tallest = 0
        for panel in board.rows[heading]:
            if x + panel.width > 24:
                x, y, tallest = 0, y + tallest, 0
            yield panel, x, y
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _named(legend: str, line: Line) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: line.labels.get(match[1], ""), legend).strip()


def said(value: float, unit: str) -> str:
    """Return a value in a unit of Grafana's, short enough for an axis."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{1000 * value:.3g} ms" if value else "0 s"
    if unit in ("bytes", "Bps"):
        for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
            if abs(value) >= 1024**power:
                return f"{value / 1024**power:.3g} {name}" + ("/s" if unit == "Bps" else "")
        return f"{value:.3g} B"
    return f"{value:.1e}" if unit == "sci" and value else f"{value:.4g}"


def _stat(card: Any, panel: Panel, lines: dict[str, Line]) -> None:
    """Write the newest values side by side, with their names where there are several."""
    shown: list[tuple[str, float | None]] = [(name, line.values[-1]) for name, line in lines.items()] or [("", None)]
    for number, (name, value) in enumerate(shown):
        bad = value is not None and (
            (panel.red_above is not None and value >= panel.red_above)
            or (panel.red_below is not None and value < panel.red_below)
        )
        middle = (number + 0.5) / len(shown)
        text = "none" if value is None else said(value, panel.unit)
        card.text(middle, 0.42, text, transform=card.transAxes, color=_COLOURS[4] if bad else _COLOURS[0], fontsize=19,
                  ha="center", va="center", weight="bold")  # fmt: skip
        if len(shown) > 1:
            card.text(middle, 0.12, name, transform=card.transAxes, color=_FAINT, fontsize=8, ha="center", va="center")


def _table(card: Any, panel: Panel, lines: dict[str, Line]) -> None:
    """Write rows of names and newest values, as many as fit."""
    for row, (name, line) in enumerate(list(lines.items())[:_TABLE_ROWS]):
        height = 0.8 - row * 0.7 / _TABLE_ROWS
        value = said(line.values[-1], panel.unit)
        card.text(0.02, height, name[:40], transform=card.transAxes, color=_FAINT, fontsize=8, va="top")
        card.text(0.98, height, value, transform=card.transAxes, color=_TEXT, fontsize=8, va="top", ha="right")
    if not lines:
        _nothing(card, panel)


def _nothing(axes: Any, panel: Panel) -> None:
    text = f"needs a {panel.needs}" if panel.needs else "no data"
    axes.text(0.5, 0.5, text, transform=axes.transAxes, color=_FAINT, ha="center", va="center", fontsize=9)


def _graph(axes: Any, panel: Panel, lines: dict[str, Line]) -> None:
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.grid(color="#2a2d33", linewidth=0.6)
    axes.tick_params(colors=_FAINT, labelsize=7, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: said(value, panel.unit)))
    for (name, line), colour in zip(lines.items(), _COLOURS * 10, strict=False):
        marker = {"marker": ".", "markersize": 3} if len(line.times) < 30 else {}
        axes.plot(line.times, line.values, color=colour, linewidth=1.3, label=name, **marker)
    if lines:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[:_LEGENDS], [label[:34] for label in labels[:_LEGENDS]],
            loc="upper left", bbox_to_anchor=(-0.06, -0.09), ncols=2, fontsize=7, frameon=False,
            labelcolor=_FAINT, handlelength=1.2, columnspacing=1.2, labelspacing=0.25,
        )  # fmt: skip
    else:
        _nothing(axes, panel)
