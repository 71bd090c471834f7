"""The frame of a report page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root{--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--paper:#fff;--card:#f6f8fa;--a:#0b62c4;--b:#c2500b;--c:#18794e;
--d:#7a3fb0;--bad:#b3261e;--warn:#8a5a00;--good:#18794e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa4ae;--line:#3a424b;--paper:#14181c;--card:#1d2329;
--a:#6aa9f4;--b:#f09a5b;--c:#5fc796;--d:#bd93e6;--bad:#f2857e;--warn:#e0b054;--good:#5fc796}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 3rem}h1{font-size:1.6rem;margin:0 0 .25rem}
h2{font-size:1.1rem;margin:2rem 0 .5rem}p{margin:.35rem 0}.soft{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;margin:.5rem 0}
.mark{font-weight:600}.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}td.figure,th.figure{text-align:right;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
svg .grid{stroke:var(--line);stroke-width:1}svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;overflow-x:auto}
"""


def page(title: str, subtitle: str, parts: Iterable[str], *, language: str = "en") -> str:
    """Return a whole page; `parts` are HTML already, title and subtitle are text."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="{escape(language)}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n{body}\n</main></body></html>\n'
    )


def section(heading: str, content: str) -> str:
    """Return a headed part; `content` is HTML."""
    return f"<h2>{escape(heading)}</h2>\n{content}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, figures: Iterable[int] = ()) -> str:
    """Return a table of texts; the columns in `figures` are set to the right."""
    right = set(figures)

    def cells(texts: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=figure' if column in right else ''}>{escape(text)}</{tag}>"
            for column, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
