"""The frame of a report page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1d232a;--soft:#5b6570;--line:#d8dee4;--card:#f6f8fa;--bar:#3b6ea8;
--error:#b3261e;--warning:#9a5b00;--info:#2f6f3e;--a:#0b62c4;--b:#c2500b;--c:#18794e;--d:#7a3fb0}
@media(prefers-color-scheme:dark){:root{--back:#14181d;--text:#e4e8ec;--soft:#9aa5b1;--line:#333b44;--card:#1d232a;
--bar:#7fb0e8;--error:#ff8a80;--warning:#ffc266;--info:#81c995;--a:#6aa9f4;--b:#f09a5b;--c:#5fc796;--d:#bd93e6}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem;background:var(--back);
color:var(--text)}
h1{font-size:1.5rem;margin:0 0 .25rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2.2rem 0 .8rem}
h3{font-size:1rem;margin:0}p{margin:.4rem 0}.soft{color:var(--soft)}
.mark{font-weight:600}.good{color:var(--info)}.warning{color:var(--warning)}.error{color:var(--error)}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem 1rem;margin:.5rem 0}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;overflow-x:auto}
svg.lines{display:block;width:100%;height:auto}svg.lines text{fill:var(--soft);font:12px system-ui,sans-serif}
svg.lines .grid{stroke:var(--line)}svg.lines polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg.lines{overflow:visible}@media(max-width:40rem){svg.lines text{font-size:18px}}
"""


def page(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """Return a whole page; the title is text, `parts` are HTML already, `style` is CSS of the page's own."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def section(heading: str, content: str) -> str:
    """Return a headed part; `content` is HTML."""
    return f"<h2>{escape(heading)}</h2>\n{content}"
