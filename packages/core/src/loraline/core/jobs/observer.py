"""The port through which the job engine tells what it does, for metrics."""

from __future__ import annotations

from typing import Protocol

from loraline.core.jobs.model import QueueState
from loraline.core.jobs.telemetry import Telemetry


class JobObserver(Protocol):
    """Hears of jobs; called from several threads, so implementations must be thread-safe and quick."""

    def job_submitted(self, kind: str) -> None:
        """A new job was queued."""

    def job_started(self, kind: str, queue_seconds: float) -> None:
        """A runner of this process started a job that had waited for so long."""

    def job_finished(self, kind: str, state: str, seconds: float) -> None:
        """An attempt ended in this process after so long; `state` is what the job is now: SUCCEEDED, QUEUED, …"""

    def job_told(self, kind: str, job: str, figures: Telemetry) -> None:
        """The process of a job counted these since it last told, and its gauges stand so."""

    def job_gone(self, kind: str, job: str) -> None:
        """The process of a job has ended: its gauges end with it."""

    def lease_takeover(self, kind: str) -> None:
        """A runner of this process took a job from a silent one."""

    def queue_state(self, state: QueueState) -> None:
        """The queue of one of this process's kinds looks so now; told every few seconds."""


class NoObserver:
    """Hears and forgets."""

    def job_submitted(self, kind: str) -> None:
        """Do nothing."""

    def job_started(self, kind: str, queue_seconds: float) -> None:
        """Do nothing."""

    def job_finished(self, kind: str, state: str, seconds: float) -> None:
        """Do nothing."""

    def job_told(self, kind: str, job: str, figures: Telemetry) -> None:
        """Do nothing."""

    def job_gone(self, kind: str, job: str) -> None:
        """Do nothing."""

    def lease_takeover(self, kind: str) -> None:
        """Do nothing."""

    def queue_state(self, state: QueueState) -> None:
        """Do nothing."""
