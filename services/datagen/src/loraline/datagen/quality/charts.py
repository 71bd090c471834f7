"""The report's charts: inline SVG without scripts; words stand beside it, so that they never shrink."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_GAP = 0.12


def columns(title: str, lengths: Mapping[str, Any]) -> str:
    """Return a histogram with its smallest, median, 95th percentile and largest value; nothing without rows."""
    histogram = lengths.get("histogram") or []
    if not histogram:
        return ""
    tallest = max(bar["rows"] for bar in histogram)
    drawn: list[str] = []
    for at, bar in enumerate(histogram):
        height = 100 * bar["rows"] / tallest
        height = max(height, 1.0) if bar["rows"] else 0.0
        told = f"{bar['from']} to {bar['to'] - 1}: {bar['rows']} rows"
        drawn.append(
            f'<rect x="{at + _GAP:.2f}" y="{100 - height:.2f}" width="{1 - 2 * _GAP:.2f}" height="{height:.2f}">'
            f"<title>{told}</title></rect>"
        )
    told = f"median {lengths['median']:,}, 95 % up to {lengths['p95']:,}, longest {lengths['max']:,}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {len(histogram)} 100" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">'
        f'{"".join(drawn)}</svg><div class="axis"><span>{histogram[0]["from"]:,}</span>'
        f'<span>{_last(histogram[-1], lengths["max"])}</span></div><p class="soft">{told}</p></figure>'
    )


def _last(bar: Mapping[str, int], longest: int) -> str:
    return f"{bar['from']:,} and more" if bar["to"] > longest and bar["to"] - bar["from"] > 1 else f"{longest:,}"


def bars(title: str, counts: Mapping[str, int], *, zeros: bool = False, styled: bool = False) -> str:
    """Return labelled bars; nothing without any. `styled` gives each bar its label as its class."""
    shown = {name: count for name, count in counts.items() if count or zeros}
    if not shown:
        return ""
    largest = max(1, *shown.values())
    rows = "".join(
        f'<span class="label">{escape(name.replace("_", " "))}</span>'
        f'<svg class="{escape(name) if styled else ""}" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{count}"><rect width="{100 * count / largest:.2f}" height="10"/></svg>'
        f'<span class="count">{count:,}</span>'
        for name, count in shown.items()
    )
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="bars">{rows}</div></figure>'
