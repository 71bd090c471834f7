"""The trainer's own metrics. Gauges are there for live runs only; their label is the run's name."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

RUN = ("run",)
PROGRESS_GAUGES = {
    "loss": "Training loss of a live run in nats per token.",
    "eval_loss": "Newest evaluation loss of a live run in nats per token.",
    "token_accuracy": "Share of response tokens that a live run predicts right, 0 to 1.",
    "learning_rate": "Learning rate of a live run.",
    "grad_norm": "Norm of a live run's gradient before clipping.",
    "tokens_per_second": "Tokens a second of a live run, padding not counted.",
    "step_seconds": "Time of a live run's newest optimizer step.",
    "epoch": "Passes over the data that a live run has made.",
    "gpu_memory_bytes": "Most GPU memory that a live run has held.",
}
"""Gauges that follow a run's progress, by the names of its figures."""


def job_metrics(registry: CollectorRegistry) -> dict[str, Counter | Gauge]:
    """Return the metrics that jobs feed, by the names that they feed them under."""
    counters = {
        "steps": ("Optimizer steps made.", RUN),
        "oom_recoveries": ("Times that a run went on with less memory after it had run out.", RUN),
        "checkpoints": (
            "Checkpoints by result: saved, torn (found damaged), published (sent to the store), unpublished.",
            ("result",),
        ),
        "checkpoint_seconds": ("Time spent sealing checkpoints.", ()),
        "checkpoint_bytes": ("Bytes of checkpoints sealed.", ()),
        "runs": ("Runs that ended their training, by what the loss curve says of them.", ("verdict",)),
    }
    gauges = {
        **PROGRESS_GAUGES,
        "step": "Optimizer steps that a live run has made.",
        "steps_planned": "Optimizer steps that a live run will have made at its end.",
        "eta_seconds": "Time that a live run still needs.",
    }
    metrics: dict[str, Counter | Gauge] = {
        f"trainer_{name}": Counter(f"loraline_trainer_{name}", text, labels, registry=registry)
        for name, (text, labels) in counters.items()
    }
    for name, text in gauges.items():
        metrics[f"trainer_{name}"] = Gauge(f"loraline_trainer_{name}", text, RUN, registry=registry)
    return metrics
