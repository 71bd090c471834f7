"""Checkpoints in the artifact store, so that a run goes on although the machine that trained it is gone."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_CHECKPOINT, Artifact
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError, data_loss
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.model import LeaseLost
from loraline.core.structs import json_value
from loraline.trainer import checkpoints
from loraline.trainer.config import TrainerSettings

_KEPT = 2
"""Checkpoints of a job that stay in the store: the newest, and the one before should that be lost."""

_SHARE_OF_GRACE = 0.5
"""Share of the time between SIGTERM and SIGKILL that sending the last checkpoint may take."""


def publishes(settings: CoreSettings, own: TrainerSettings) -> bool:
    """Whether checkpoints go to the store; by itself only to a store that other machines can read."""
    if own.publish_checkpoints == "auto":
        return not settings.store_url.startswith("file://")
    return own.publish_checkpoints == "always"


def published_checkpoints(library: ArtifactLibrary, run: str, jobs: Collection[str]) -> list[Artifact]:
    """Return the checkpoints of these jobs that lie in the store, most steps first.

    What people uploaded is not among them: a checkpoint holds pickles, and only a run's own are ever opened.
    """
    found: list[Artifact] = []
    token = ""
    while True:
        page, token = library.list(kind=ARTIFACT_KIND_CHECKPOINT, name=run, page_size=500, page_token=token)
        found += [artifact for artifact in page if artifact.job in jobs]
        if not token:
            return sorted(found, key=step_of, reverse=True)


def step_of(artifact: Artifact) -> int:
    """Return the optimizer step of a checkpoint in the store."""
    return int(figures_of(artifact).get("step", -1))


def figures_of(artifact: Artifact) -> dict[str, float]:
    """Return step, epoch and loss of a checkpoint in the store, as far as they are known."""
    facts = json_value(artifact.facts)
    return {name: facts[name] for name in ("step", "epoch", "loss") if isinstance(facts.get(name), int | float)}


def bring(library: ArtifactLibrary, artifact: Artifact, folder: Path) -> Path:
    """Copy a checkpoint from the store into a folder of checkpoints, whole or not at all.

    Raises DATA_LOSS when the store's copy does not verify or is no whole checkpoint.
    """
    return place(library.fetch(artifact.ref), f"checkpoint-{step_of(artifact)}", folder)


def place(source: Path, name: str, folder: Path) -> Path:
    """Copy a checkpoint under this name into a folder of checkpoints, whole or not at all."""
    incoming = folder / f".incoming-{name}"
    shutil.rmtree(incoming, ignore_errors=True)
    shutil.copytree(source, incoming)
    problem = checkpoints.damage(incoming)
    if problem:
        shutil.rmtree(incoming, ignore_errors=True)
        raise data_loss("CHECKPOINT_DAMAGED", f"The checkpoint {name} {problem}. Go on from an earlier one.")
    target = folder / name
    checkpoints.remove([target])
    return incoming.rename(target)


def recover(context: JobContext, run: str, own: Path) -> None:
    """Bring this job's newest checkpoint from the store when it is ahead of what lies on this machine."""
    good, _ = checkpoints.newest_good(own)
    here = checkpoints.step_of(good) if good else -1
    for artifact in published_checkpoints(context.library, run, {context.job}):
        if step_of(artifact) <= here:
            return
        try:
            brought = bring(context.library, artifact, own)
        except LoralineError as error:
            context.note(
                f"checkpoint v{artifact.ref.version}: {error.message}", severity="warning", reason=error.reason
            )
            continue
        context.note(f"{brought.name} was brought from the store", reason="CHECKPOINT_FETCHED", checkpoint=brought.name)
        return


@contextmanager
def publishing(context: JobContext, own: TrainerSettings, run: str) -> Iterator[CheckpointPublisher | None]:
    """Send checkpoints to the store for the time of a training, or give None where that is not wanted.

    Leaving waits for what is on its way, within the grace that a stopping job has.
    """
    if not publishes(context.settings, own):
        yield None
        return
    publisher = CheckpointPublisher(context, run)
    try:
        yield publisher
    finally:
        if not publisher.close(_SHARE_OF_GRACE * context.settings.stop_grace_seconds):
            context.note(
                "the newest checkpoint is on this machine only: the store is slow",
                severity="warning",
                reason="CHECKPOINT_NOT_PUBLISHED",
            )


class CheckpointPublisher:
    """Sends sealed checkpoints to the store in a thread; training does not wait for it.

    A checkpoint that was saved while another is still on its way replaces those that wait, so that a slow store is
    never more than one behind. When a checkpoint cannot be sent the run goes on and says so.
    """

    def __init__(self, context: JobContext, run: str):
        self._context, self._run = context, run
        self._outgoing = context.workdir / "outgoing"
        shutil.rmtree(self._outgoing, ignore_errors=True)
        self._waiting: Path | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint-publisher", daemon=True)
        self._thread.start()

    def offer(self, checkpoint: Path) -> None:
        """Take a sealed checkpoint; its files are held by links, so that it may be rotated away meanwhile."""
        held = self._outgoing / checkpoint.name
        shutil.rmtree(held, ignore_errors=True)
        shutil.copytree(checkpoint, held, copy_function=os.link)
        with self._changed:
            late, self._waiting = self._waiting, held
            self._changed.notify()
        if late is not None:
            shutil.rmtree(late, ignore_errors=True)

    def close(self, seconds: float) -> bool:
        """Wait until everything offered is in the store, at most so long; return whether it is."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting is not None)
                held, self._waiting = self._waiting, None
            if held is None:
                return
            try:
                self._publish(held)
            except LeaseLost:
                return  # another machine has the job; the training thread learns of it by itself
            except Exception as error:
                self._tell(held, error)
            finally:
                shutil.rmtree(held, ignore_errors=True)

    def _publish(self, held: Path) -> None:
        step, state = checkpoints.step_of(held), checkpoints.trainer_state(held)
        losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
        facts = {"step": step, "epoch": state.get("epoch"), "loss": losses[-1] if losses else None}
        self._context.publish(
            ARTIFACT_KIND_CHECKPOINT,
            self._run,
            held,
            facts={key: value for key, value in facts.items() if value is not None},
        )
        self._context.count("trainer_checkpoints", result="published")
        for old in published_checkpoints(self._context.library, self._run, {self._context.job})[_KEPT:]:
            self._context.library.delete(old.ref)

    def _tell(self, held: Path, error: Exception) -> None:
        message = error.message if isinstance(error, LoralineError) else f"{type(error).__name__}: {error}"
        try:
            self._context.count("trainer_checkpoints", result="unpublished")
            self._context.note(
                f"{held.name} could not be sent to the store: {message} It is kept on this machine.",
                severity="warning",
                reason="CHECKPOINT_NOT_PUBLISHED",
            )
        except Exception as problem:
            print(f"{held.name} could not be sent to the store: {message} ({problem})", flush=True)  # to the job's log
