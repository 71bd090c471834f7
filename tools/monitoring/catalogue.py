"""`python tools/monitoring/catalogue.py [FILE]`: writes docs/metrics.md from what the four services register.

Each stage's server is started alone, on a free port and a folder of its own, and its registry is asked what it
declares. So the page cannot name a metric that no server has, nor leave one out.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric

from loraline.allinone.stages import STAGES
from loraline.core.config import CoreSettings
from loraline.core.serving.addresses import free_port
from loraline.core.serving.server import open_platform, serve

LABELS = {
    "adapter": "adapters that can be asked now, by name and version; the series go when one is unloaded",
    "base_model": "base models of the trainings that run now",
    "cause": "`died`, `hung`",
    "code": "codes of findings and repairs (a list in the merger)",
    "direction": "`in`, `out` (datagen); `prompt`, `completion` (inference)",
    "endpoint": "names of language model endpoints; at most 200 series a metric, the rest is counted as `other`",
    "engine": "vLLM's number of the engine",
    "event": "what can happen to a session (a list of seven)",
    "generation": "generations of Python's garbage collector",
    "gpu": "indexes of the machine's GPUs",
    "grpc_code": "gRPC status codes",
    "grpc_method": "methods of the server's contract",
    "grpc_service": "services of the server's contract",
    "grpc_type": "`unary`, `client_stream`, `server_stream`, `bidi_stream`",
    "implementation": "of Python",
    "kind": "kinds of job (ten), or what was written: `merge`, `export`",
    "le": "bounds of a histogram",
    "major": "of Python",
    "minor": "of Python",
    "model": "models of language model endpoints; at most 200 series a metric, the rest is counted as `other`",
    "model_kind": "`base`, `adapter`, `none` (refused before a model was found)",
    "model_name": "the model that vLLM serves",
    "operation": "`publish`, `publish_unchanged`, `fetch`, `verify`",
    "outcome": "`ok`, `cancelled` or a reason of docs/troubleshooting.md; datagen: `accepted`, what came to nothing "
    "(`rejected_<rule>`, `duplicate`, `unparsable_answer`, `timeout`, `set_aside`, `filtered`, `refused`, "
    "`bad_record`, `no_prompt`) and what is told besides (`repaired`, `mended`, `surplus`)",
    "part": "the server's stages, `database`, `server`; of a merge: `write`, `measure`",
    "patchlevel": "of Python",
    "profile": "response profiles of the server's profile folder",
    "reason": "reasons of docs/troubleshooting.md, or the kinds of limit: `rate`, `overloaded`, `quota`, …",
    "result": "`ok`, `loaded`, results of checkpoints, or a reason of docs/troubleshooting.md",
    "run": "names of the trainings that run now; the series go when the run ends",
    "severity": "`info`, `warning`, `error`",
    "shape": "kinds of structured answer (a list in inference)",
    "source": "kinds of source: convert, template, llm, …",
    "state": "states of a job (six)",
    "verdict": "`good`, `fair`, `undertrained`, `overfit`, `diverged`, `no_signal`, `data_bug`",
    "version": "of Python",
    "finished_reason": "why an answer ended: `stop`, `length`, `abort`, …",
}
"""Every label that may occur -> the values it can take. A label that is not here fails the check."""

_ENGINE = ("engine", "model_name")
VLLM: dict[str, tuple[str, tuple[str, ...], str]] = {
    "vllm:num_requests_running": ("gauge", _ENGINE, "Requests in the batch now."),
    "vllm:num_requests_waiting": ("gauge", _ENGINE, "Requests that wait for a place in the batch."),
    "vllm:kv_cache_usage_perc": ("gauge", _ENGINE, "Part of the KV cache in use, 0 to 1 despite its name."),
    "vllm:prompt_tokens_total": ("counter", _ENGINE, "Tokens of prompts."),
    "vllm:generation_tokens_total": ("counter", _ENGINE, "Tokens generated."),
    "vllm:prefix_cache_queries_total": ("counter", _ENGINE, "Tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits_total": ("counter", _ENGINE, "Tokens found in the prefix cache."),
    "vllm:num_preemptions_total": ("counter", _ENGINE, "Requests thrown out of the batch for want of KV cache."),
    "vllm:request_success_total": ("counter", (*_ENGINE, "finished_reason"), "Answers that ended, by why."),
    "vllm:time_to_first_token_seconds": ("histogram", _ENGINE, "Time in the engine up to the first token."),
    "vllm:inter_token_latency_seconds": ("histogram", _ENGINE, "Time between two tokens of an answer."),
    "vllm:e2e_request_latency_seconds": ("histogram", _ENGINE, "Time of a whole answer in the engine."),
    "vllm:request_queue_time_seconds": ("histogram", _ENGINE, "Time that a request waited in the engine."),
}
"""Those of vLLM's own metrics that the dashboards and alerts use. All of them pass through, under vLLM's names."""

_UNITS = {
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_ratio": "0 to 1",
    "_usd": "US dollars",
    "_nats": "nats",
    "_bytes_per_second": "bytes a second",
    "_tokens_per_second": "tokens a second",
    "_samples_per_second": "rows a second",
    "_loss": "nats per token",
    "_perc": "0 to 1",
}


@dataclass(frozen=True)
class Family:
    """A metric as Prometheus names it."""

    name: str
    kind: str
    """`counter`, `gauge`, `histogram` or `info`."""
    labels: tuple[str, ...]
    text: str
    services: tuple[str, ...]
    shown: frozenset[tuple[str, str, str]] = frozenset()
    """Series, label and value of what fresh servers show before anything has happened; a histogram's `le` is one."""

    @property
    def unit(self) -> str:
        """The unit in words; `1` for plain numbers and counts."""
        bare = self.name.removesuffix("_total")
        fits = [ending for ending in _UNITS if bare.endswith(ending)]
        return _UNITS[max(fits, key=len)] if fits else "1"

    @property
    def series(self) -> tuple[str, ...]:
        """Names that a query may use."""
        endings = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(self.name + ending for ending in endings)


def families() -> list[Family]:
    """Return every metric of the platform, sorted by name."""
    found: dict[str, Family] = {}
    with _plain_environment():
        for service in STAGES:
            for new in asyncio.run(_of_service(service)):
                old = found.get(new.name, Family(new.name, new.kind, new.labels, new.text, ()))
                found[new.name] = replace(new, services=(*old.services, service), shown=old.shown | new.shown)
    for name, (kind, labels, text) in VLLM.items():
        found[name] = Family(name, kind, labels, text, ("inference",))
    return sorted(found.values(), key=lambda family: family.name)


@contextmanager
def _plain_environment() -> Iterator[None]:
    """Hide this machine's settings: the page is the same everywhere."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("LORALINE_")]:
        del os.environ[name]
    os.environ["LORALINE_INFERENCE_HTTP_LISTEN"] = ""
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def _of_service(service: str) -> list[Family]:
    with tempfile.TemporaryDirectory() as folder:
        settings = CoreSettings(data_dir=Path(folder) / "d", listen=f"127.0.0.1:{free_port()}", metrics_listen="")
        platform = open_platform(settings)
        stop, declared = asyncio.Event(), list[Family]()

        def ready(_: Any) -> None:
            declared.extend(_declared(platform.registry))
            stop.set()

        try:
            await serve(settings, [STAGES[service]], platform=platform, ready=ready, stop=stop)
        finally:
            platform.database.close()
    return declared


def _declared(registry: Any) -> Iterator[Family]:
    shown: dict[str, set[tuple[str, str, str]]] = {}
    for metric in registry.collect():
        values = {(sample.name, *pair) for sample in metric.samples for pair in sample.labels.items()}
        shown.setdefault(_full_name(metric), set()).update(values)
    for collector in list(registry._collector_to_names):
        own: list[Metric] = list(collector.describe()) if hasattr(collector, "describe") else list(collector.collect())
        for metric in own:
            labels = getattr(collector, "_labelnames", None) or getattr(metric, "_labelnames", None)
            if not labels:
                labels = sorted({label for sample in metric.samples for label in sample.labels})
            name = _full_name(metric)
            yield Family(name, metric.type, tuple(labels), metric.documentation, (), frozenset(shown.get(name, ())))


def _full_name(metric: Metric) -> str:
    return metric.name + ("_total" if metric.type == "counter" else "_info" if metric.type == "info" else "")


_HEAD = """# Metrics

<!-- Made by `python tools/monitoring/catalogue.py docs/metrics.md`; edit the metrics' own texts, not this page. -->

Every service answers `GET /metrics` on `LORALINE_METRICS_LISTEN`, without a key: keep that port inside your network.
`loraline up` has all of them on one port. Names carry their unit: `_seconds`, `_bytes`, `_ratio` (0 to 1); counters end
in `_total`. A histogram's series are `<name>_bucket`, `_sum` and `_count`. No series carries the name of a job. Series
named by a run or an adapter are there only while the run is live or the adapter can be asked. How to watch them:
[operate.md](operate.md).
"""
_SECTIONS = (
    ("Every service: jobs, artifacts, readiness, disk, GPU", "loraline_"),
    ("Datagen", "loraline_datagen_"),
    ("Trainings that run now", "loraline_training_"),
    ("Trainer", "loraline_trainer_"),
    ("Merger", ("loraline_merge_", "loraline_model_")),
    ("Inference", "loraline_inference_"),
    ("vLLM's own, as far as the dashboards and alerts use them; all others pass through, too", "vllm:"),
    ("gRPC, under the names of go-grpc-prometheus", "grpc_"),
    ("Process and Python", ("process_", "python_")),
)


def render(found: list[Family]) -> str:
    """Return the page. KeyError names a label without an explanation."""
    parts = [_HEAD]
    special = [prefix for _, prefix in _SECTIONS if prefix != "loraline_"]
    left = list(found)
    for title, prefix in _SECTIONS:
        mine = [
            family
            for family in left
            if family.name.startswith(prefix)
            and (prefix != "loraline_" or not any(family.name.startswith(other) for other in special))
        ]
        left = [family for family in left if family not in mine]
        lines = [f"## {title}", "", "| metric | type | unit | labels | services | meaning |", "|" + " --- |" * 6]
        lines += [_row(family) for family in mine]
        parts.append("\n".join(lines) + "\n")
    if left:
        raise KeyError(f"no section takes {[family.name for family in left]}")
    used = sorted({label for family in found for label in family.labels})
    lines = ["## Labels and what bounds them", "", "| label | values |", "| --- | --- |"]
    parts.append("\n".join(lines + [f"| `{label}` | {LABELS[label]} |" for label in used]) + "\n")
    return "\n".join(parts)


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    services = "all" if len(family.services) == len(STAGES) else ", ".join(family.services)
    text = family.text.replace("|", "\\|").replace("\n", " ")
    return f"| `{family.name}` | {family.kind} | {family.unit} | {labels} | {services} | {text} |"


if __name__ == "__main__":
    page = render(families())
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
