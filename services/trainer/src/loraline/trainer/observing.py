"""What a training tells its job: progress, remarks, figures, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from loraline.core.jobs.context import JobContext
from loraline.trainer.published import CheckpointPublisher


class ContextObserver:
    """Passes what the engine reports on to the job."""

    def __init__(
        self,
        context: JobContext,
        run: str,
        publisher: CheckpointPublisher | None = None,
        *,
        begun: Callable[[], None] | None = None,
    ):
        """Pass reports of `run` on; `begun` is called once, when its first step was made."""
        self.context, self.run, self.publisher = context, run, publisher
        self._begun = begun
        self._counted = 0

    def progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        """Report a step."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun()
        message = f"step {step}/{total}"
        if "loss" in metrics:
            message += f", loss {metrics['loss']:.3f}"
        if "token_accuracy" in metrics:
            message += f", token accuracy {metrics['token_accuracy']:.3f}"
        self.context.progress(
            step=step, total_steps=total, eta_seconds=eta_seconds, message=message, unit="step", metrics=metrics
        )
        self.count("steps", max(0, step - self._counted) if self._counted else 1)
        self._counted = step

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to one of the trainer's counters."""
        self.context.count(f"trainer_{name}", amount, **labels)

    def note(self, message: str, *, severity: str = "info", reason: str = "") -> None:
        """Add an event."""
        self.context.note(message, severity=severity, reason=reason)

    def saved(self, checkpoint: Path) -> None:
        """Send a checkpoint to the store, where that is wanted."""
        if self.publisher is not None:
            self.publisher.offer(checkpoint)

    @property
    def stop_cause(self) -> str:
        """Why the job shall stop."""
        return self.context.stop_cause
