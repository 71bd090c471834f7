"""The judgement as a page for people: curves, reasons, what to run next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.artifacts.refs import format_ref
from loraline.core.pages.charts import Line, line_chart
from loraline.core.pages.frame import page, section
from loraline.trainer.diagnosis.history import History, Point
from loraline.trainer.diagnosis.judging import Judgement
from loraline.trainer.diagnosis.sign import Facts, Sign

_WORDS = {
    pb.VERDICT_GOOD: ("good", "The run did what it should."),
    pb.VERDICT_FAIR: ("warning", "Usable; more training may help."),
    pb.VERDICT_UNDERTRAINED: ("warning", "The loss is still too high."),
    pb.VERDICT_OVERFIT: ("warning", "The rows are learned by heart."),
    pb.VERDICT_DIVERGED: ("error", "The run went astray."),
    pb.VERDICT_NO_SIGNAL: ("error", "Nothing was learned."),
    pb.VERDICT_DATA_BUG: ("error", "The data make learning impossible."),
}


_PHASES = (
    (pb.RUN_PHASE_BEFORE, "Before: data and settings"),
    (pb.RUN_PHASE_DURING, "During: the course of the loss"),
    (pb.RUN_PHASE_AFTER, "After: what came out"),
)
_STYLE = """
.verdict{font-size:1.15rem}.verdict .mark{text-transform:uppercase;letter-spacing:.03em;margin-right:.6rem}
.checks{list-style:none;margin:0;padding:0}.checks li{display:grid;grid-template-columns:4.5rem 1fr;gap:0 .5rem;
padding:.45rem 1rem;border-top:1px solid var(--line)}
.checks li:first-child{border-top:0}.checks p{margin:0;grid-column:2}
.checks code{font-size:.72rem;color:var(--soft);margin-left:.25rem}
table{border-collapse:collapse;width:100%;table-layout:fixed}
th,td{text-align:left;vertical-align:top;padding:.45rem .5rem;
border-top:1px solid var(--line);overflow-wrap:anywhere;white-space:pre-wrap}th{color:var(--soft);font-weight:500}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9}
.tokens span,.tokens mark{border-left:1px solid var(--line);color:inherit;padding:.1rem 0}
.tokens mark{background:color-mix(in srgb,#2e9e5b 28%,transparent)}
@media(max-width:40rem){table,tbody,tr,td{display:block}thead{display:none}td{border:0;padding:.15rem 0}
tr{border-top:1px solid var(--line);padding:.5rem 0;display:block}
td::before{content:attr(data-of) ": ";color:var(--soft)}}
"""


def html_page(
    title: str,
    judgement: Judgement,
    history: History,
    patch: Mapping[str, object],
    facts: Facts | None = None,
    larger_base: ArtifactRef | None = None,
) -> str:
    """Return the page."""
    name = pb.Verdict.Name(judgement.verdict).removeprefix("VERDICT_").replace("_", " ").lower()
    mark, words = _WORDS[judgement.verdict]
    steps = history.points[-1].step
    subtitle = f"{steps} steps" + (f", {history.epochs:.1f} epochs" if history.epochs else "")
    parts = [
        f'<p class="soft">{escape(subtitle)}</p>',
        f'<div class="card verdict"><span class="mark {mark}">{escape(name)}</span>{escape(words)}</div>',
        section("Loss, in nats per token", _losses(history)),
    ]
    for phase, heading in _PHASES:
        rows = "".join(_shown(sign) for sign in judgement.signs if sign.phase == phase)
        if rows:
            parts.append(section(heading, f'<ul class="card checks">{rows}</ul>'))
    if patch or larger_base:
        parts.append(section("Run next with", f"<pre>{escape(as_pipeline(patch, larger_base))}</pre>"))
    if facts is not None and facts.samples:
        parts.append(section("What base and adapter answer", _answers(facts.samples)))
    if facts is not None and facts.first_batch:
        parts.append(section("What the model was shown first", _batch(facts.first_batch)))
    parts.extend(_others(history))
    return page(title, parts, style=_STYLE)


def as_pipeline(patch: Mapping[str, object], base: ArtifactRef | None = None) -> str:
    """Return settings, and a base to take, as a pipeline file writes them: LoRA's own with the prefix lora_."""
    flat: dict[str, object] = {}
    for name, value in patch.items():
        if name == "lora" and isinstance(value, Mapping):
            flat |= {f"lora_{inner}": setting for inner, setting in value.items()}
        else:
            flat[name] = value
    lines = [
        f"    {name}: {value:g}" if isinstance(value, float) else f"    {name}: {value}" for name, value in flat.items()
    ]
    head = [f"base_model: {{artifact: {format_ref(base)}}}"] if base is not None else []
    return "\n".join([*head, *(["train:", "  training_params:", *lines] if lines else [])])


def _answers(samples: Sequence[pb.SampleAnswers]) -> str:
    rows = []
    for sample in samples:
        asked = f"{sample.prompt} ({sample.origin.replace('_', ' ')})"
        cells = (("asked", asked), ("base", sample.base), ("adapter", sample.adapter), ("row", sample.reference))
        shown = "".join(f'<td data-of="{of}">{escape(text) or "—"}</td>' for of, text in cells)
        rows.append(f"<tr>{shown}</tr>")
    head = "<thead><tr><th>asked</th><th>base</th><th>adapter</th><th>row</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _batch(rows: Sequence[pb.BatchRow]) -> str:
    """Return rows with their token borders; what carries loss is marked."""
    shown = []
    for number, row in enumerate(rows, start=1):
        tokens = "".join(
            _token(token_id, text, "mark" if trained else "span")
            for token_id, text, trained in zip(row.token_ids, row.tokens, row.trained, strict=True)
        )
        cut = f", the first {len(row.token_ids)} shown" if row.length > len(row.token_ids) else ""
        shown.append(
            f'<p class="soft">row {number}: {row.length} tokens{cut}, {sum(row.trained)} carry loss</p>'
            f'<pre class="tokens">{tokens}</pre>'
        )
    return f'<p class="soft">Marked tokens carry loss; hold the pointer over one for its id.</p>{"".join(shown)}'


def _token(token_id: int, text: str, tag: str) -> str:
    return f'<{tag} title="{token_id}">{escape(text)}</{tag}>'


def _losses(history: History) -> str:
    lines = [
        Line("training", [(point.step, point.loss) for point in history.points]),
        Line("running mean", _running_mean(history.points)),
    ]
    if history.evaluations:
        lines.append(Line("evaluation", history.evaluations))
    return line_chart(lines, x_label="step", title="Loss by step")


def _others(history: History) -> list[str]:
    """Return the curves of what was logged besides the loss."""
    accuracy = [(point.step, point.token_accuracy) for point in history.points if point.token_accuracy is not None]
    rates = [(point.step, point.learning_rate) for point in history.points if point.learning_rate]
    norms = [(point.step, point.grad_norm) for point in history.points if point.grad_norm]
    wanted = (("Token accuracy", accuracy), ("Learning rate", rates), ("Gradient norm before clipping", norms))
    return [
        section(heading, line_chart([Line(heading.lower(), points)], x_label="step", title=heading))
        for heading, points in wanted
        if len(points) > 1
    ]


def _running_mean(points: tuple[Point, ...]) -> list[tuple[int, float]]:
    """Return the mean over a twentieth of the run around each step: single batches jump too much to be read."""
    reach = max(1, len(points) // 40)
    smooth = []
    for number, point in enumerate(points):
        around = [other.loss for other in points[max(0, number - reach) : number + reach + 1]]
        smooth.append((point.step, sum(around) / len(around)))
    return smooth


def _shown(sign: Sign) -> str:
    mark, word = ("good", "passed") if sign.passed else ("error", "failed") if sign.grave else ("warning", "look")
    remedy = f'<p class="soft">{escape(sign.remedy)}</p>' if sign.remedy else ""
    return (
        f'<li><span class="mark {mark}">{word}</span><p>{escape(sign.message)} <code>{escape(sign.code)}</code></p>'
        f"{remedy}</li>"
    )
