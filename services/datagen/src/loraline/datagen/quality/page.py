"""report.html: one page with everything in it, for wide and narrow windows, light and dark."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from loraline.core.pages import frame
from loraline.core.pages.frame import section
from loraline.datagen.quality.charts import bars, columns

STYLE = """
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem;margin:1.2rem 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.facts b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.85rem}
article{border:1px solid var(--line);border-left:.35rem solid var(--info);border-radius:.4rem;padding:.7rem 1rem;
margin:.8rem 0}
article.error,article.warning,article.info{color:inherit}
article.error{border-left-color:var(--error)}article.warning{border-left-color:var(--warning)}
.tag{font-size:.75rem;font-weight:600;text-transform:uppercase;letter-spacing:.04em;margin-right:.5rem}
.error .tag{color:var(--error)}.warning .tag{color:var(--warning)}.info .tag{color:var(--info)}
summary{cursor:pointer;margin-top:.5rem}
.rows{list-style:none;margin:.5rem 0 0;padding:0}.rows li{border-top:1px solid var(--line);padding:.5rem 0}
.rows p{margin:.15rem 0;white-space:pre-wrap;overflow-wrap:anywhere}.rows .who{color:var(--soft);font-size:.8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem 1rem}
figcaption{font-weight:600;margin-bottom:.5rem}figure svg{display:block;width:100%;height:7rem}
rect{fill:var(--bar)}.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:.8rem}
.bars{display:grid;grid-template-columns:minmax(4rem,auto) 1fr auto;gap:.25rem .6rem;align-items:center;font-size:.9rem}
.bars svg{height:.8rem}.bars .label{overflow-wrap:anywhere;max-width:9rem}
.bars .count{font-variant-numeric:tabular-nums;
text-align:right}
.bars .error rect{fill:var(--error)}.bars .warning rect{fill:var(--warning)}.bars .info rect{fill:var(--info)}
"""
LANGUAGES = {"ko": "Korean", "zh": "Chinese", "ja": "Japanese", "latin": "Latin script", "other": "other scripts",
             "none": "no letters"}  # fmt: skip
LENGTHS = {
    "prompt_characters": "Prompts, in characters",
    "answer_characters": "Answers, in characters",
    "row_tokens": "Rows, in tokens",
}


def page(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    verdict = (
        '<span class="mark good">passes</span>' if report["passed"] else '<span class="mark error">does not pass</span>'
    )
    findings = "".join(_finding(finding) for finding in report["findings"]) or "<p>Nothing was found.</p>"
    verdict = f"<p>The dataset {verdict} the gate{_counts(report)}.</p>"
    charts = f'<div class="charts">{_charts(report)}</div>'
    parts = [verdict, _facts(report), section("Findings", findings), section("Figures", charts)]
    return frame.page(f"Check of {report['dataset']}", parts, style=STYLE)


def _counts(report: dict[str, Any]) -> str:
    severities = Counter(finding["severity"] for finding in report["findings"])
    named = [
        f"{severities[severity]} {word if severities[severity] == 1 else word + 's'}"
        for severity, word in (("error", "error"), ("warning", "warning"), ("info", "note"))
        if severities[severity]
    ]
    return f": {', '.join(named)}" if named else ""


def _facts(report: dict[str, Any]) -> str:
    rows, figures = report["rows"], report["figures"]
    facts = [
        (f"{rows['train']:,}", "rows for training"),
        (f"{rows['validation']:,}", "rows for validation"),
        (f"{figures['distinct_answers']:,}", "different answers"),
        (_share(figures.get("distinct_2")), "different word pairs"),
        (_share(figures.get("distinct_sentences")), "different sentences"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in facts if value)
    return f'<div class="facts">{cells}</div>'


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _finding(finding: dict[str, Any]) -> str:
    rows = "".join(_row(example) for example in finding["examples"])
    more = finding["row_count"] - len(finding["examples"])
    named = ", ".join(example["row"] for example in finding["examples"][:3])
    rest = len(finding["examples"]) - 3 + max(more, 0)
    count = f"<code>{escape(named)}</code>" + (f" and {rest:,} more" if rest > 0 else "")
    shown = f'<details><summary>{count}</summary><ul class="rows">{rows}</ul></details>' if rows else ""
    fixable = " <code>fix</code> mends it." if finding["fixable"] and "`fix`" not in finding["remedy"] else ""
    remedy = escape(finding["remedy"]).replace("`fix`", "<code>fix</code>")
    return (
        f'<article class="{finding["severity"]}"><h3><span class="tag">{finding["severity"]}</span>'
        f"<code>{escape(finding['code'])}</code></h3><p>{escape(finding['message'])}</p>"
        f'<p class="soft">{escape(finding["why"])}</p><p>{remedy}'
        f"{fixable}</p>{shown}</article>"
    )


def _row(example: dict[str, str]) -> str:
    source = f" · {escape(example['source'])}" if "source" in example else ""
    texts = "".join(
        f'<p><span class="who">{who}</span> {escape(example[who])}</p>'
        for who in ("prompt", "answer", "text")
        if example.get(who)
    )
    return f'<li><code>{escape(example["row"])}</code><span class="soft">{source}</span>{texts}</li>'


def _charts(report: dict[str, Any]) -> str:
    figures = report["figures"]
    drawn = [columns(title, figures["lengths"].get(name, {})) for name, title in LENGTHS.items()]
    languages = {str(LANGUAGES.get(name, name)): count for name, count in figures["languages"].items()}
    drawn += [
        bars("Languages of the answers", languages),
        bars("Kinds of rows", figures["kinds"]),
        bars("Formats of the answers", figures["formats"]),
        bars("Rows that repeat others", figures["duplicates"], zeros=True),
        bars(
            "Rows that max_length cuts, by what they lose", figures.get("truncated", {}).get("rows_by_share_lost", {})
        ),
        bars(f"Emoji ({figures['rows_with_emoji']:,} rows have some)", dict(list(figures["emoji"].items())[:10])),
    ]
    severities = Counter(finding["severity"] for finding in report["findings"])
    counts = {name: severities[name] for name in ("error", "warning", "info")}
    drawn.append(bars("Findings", counts, zeros=True, styled=True))
    return "".join(drawn)
