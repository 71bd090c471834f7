"""Counters that training jobs feed. Figures of live runs, by run: `loraline_training_*` of core/serving/live.py."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from loraline.api.trainer.v1 import trainer_pb2 as pb


def job_metrics(registry: CollectorRegistry) -> dict[str, Counter]:
    """Return the metrics that jobs feed, by the names that they feed them under.

    No label names a run: a counter stays for as long as the server, and runs have no end of names.
    """
    counters = {
        "steps": ("Optimizer steps made.", ()),
        "oom_recoveries": ("Times that a run went on with less memory after it had run out.", ()),
        "quantization_fallbacks": (
            "Runs that AUTO trained unquantised on a GPU short of memory, as bitsandbytes is missing or does not work.",
            (),
        ),
        "checkpoints": (
            "Checkpoints by result: saved, torn (found damaged), published (sent to the store), unpublished.",
            ("result",),
        ),
        "checkpoint_seconds": ("Time that training stood still for checkpoints; they are sealed while it goes on.", ()),
        "checkpoint_bytes": ("Bytes of checkpoints sealed.", ()),
        "runs": ("Runs that ended their training, by what the loss curve says of them.", ("verdict",)),
    }
    metrics = {
        f"trainer_{name}": Counter(f"loraline_trainer_{name}", text, labels, registry=registry)
        for name, (text, labels) in counters.items()
    }
    for verdict in VERDICTS:
        metrics["trainer_runs"].labels(verdict=verdict)
    for result in ("saved", "torn", "published", "unpublished"):
        metrics["trainer_checkpoints"].labels(result=result)
    return metrics


def verdict_name(verdict: pb.Verdict.ValueType) -> str:
    """Return the label of a verdict, such as `diverged`."""
    return pb.Verdict.Name(verdict).removeprefix("VERDICT_").lower()


VERDICTS = tuple(verdict_name(value) for value in pb.Verdict.values() if value)
