"""A run's checkpoints from one job to the next: brought along by CONTINUE, deleted by OVERWRITE."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from google.protobuf import json_format

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.model import ENDED
from loraline.core.jobs.sql_table import open_table
from loraline.trainer import checkpoints
from loraline.trainer.published import bring, place, published_checkpoints, step_of

RUN_LABEL = "run"
"""Label that every training job carries: the name of its run."""

CONTINUATION = "continuation.json"
"""File of a job that went on with an earlier one's run."""


def job_folder(data_dir: Path, job: str) -> Path:
    """Return where a job keeps its files while it works, and what it leaves behind."""
    return data_dir / "jobs" / job


def checkpoints_folder(data_dir: Path, job: str) -> Path:
    """Return where a job keeps its checkpoints."""
    return job_folder(data_dir, job) / "checkpoints"


def newest_checkpoint(data_dir: Path, jobs: list[str]) -> Path | None:
    """Return the last good checkpoint of a run on this machine; `jobs` are its jobs, newest first."""
    for job in jobs:
        good, _ = checkpoints.newest_good(checkpoints_folder(data_dir, job))
        if good is not None:
            return good
    return None


def nothing_to_continue(run: str) -> LoralineError:
    """Return FAILED_PRECONDITION (NO_CHECKPOINT)."""
    message = (
        f"The run {run} has no good checkpoint on this machine or in the store, so that nothing can be continued. "
        "Start it anew with existing_run BACKUP_AND_RESTART, or on the machine that holds its checkpoints."
    )
    return failed_precondition("NO_CHECKPOINT", message)


def bring_checkpoint(context: JobContext, run: str, epochs: float, max_steps: int) -> None:
    """Copy the run's last good checkpoint into this job's folder, whole or not at all, and say where the run stands.

    It comes from this machine or from the store, whichever is further. Does nothing when this job has a checkpoint of
    its own already: then it was interrupted and goes on from there. Raises FAILED_PRECONDITION: NO_CHECKPOINT, or
    NOTHING_LEFT_TO_TRAIN when the run has reached what is asked for.
    """
    own = checkpoints_folder(context.settings.data_dir, context.job)
    if checkpoints.newest_good(own)[0] is not None or published_checkpoints(context.library, run, {context.job}):
        return
    jobs = _ended_jobs(context, run)
    found = newest_checkpoint(context.settings.data_dir, jobs)
    stored = next(iter(published_checkpoints(context.library, run, jobs)), None)
    if stored is not None and (found is None or step_of(stored) > checkpoints.step_of(found)):
        brought = bring(context.library, stored, own)
    elif found is not None:
        brought = place(found, found.name, own)
    else:
        raise nothing_to_continue(run)
    state = checkpoints.trainer_state(brought)
    try:
        _refuse_finished(run, state, epochs, max_steps)
    except LoralineError:
        checkpoints.remove([brought])
        raise
    stands = standing(brought.name, state, 0.0 if max_steps else epochs)
    (own.parent / CONTINUATION).write_text(json_format.MessageToJson(stands) + "\n", encoding="utf-8")
    context.note(told(stands), reason="RUN_CONTINUED", checkpoint=brought.name)


def standing(name: str, state: dict, epochs: float) -> pb.Continuation:
    """Return where a run stands: checkpoint, epoch, what remains of `epochs`, last loss."""
    done = float(state.get("epoch") or 0.0)
    stands = pb.Continuation(checkpoint=name, epoch=done, remaining_epochs=max(0.0, epochs - done))
    losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
    if losses:
        stands.last_loss = losses[-1]
    return stands


def told(stands: pb.Continuation) -> str:
    """Return the same as a line for people."""
    remain = f", {stands.remaining_epochs:.2f} epochs remain" if stands.remaining_epochs else ""
    last = f"{stands.last_loss:.3f}" if stands.HasField("last_loss") else "unknown"
    return f"continues from {stands.checkpoint}: epoch {stands.epoch:.2f}{remain}, last loss {last}"


def continuation(data_dir: Path, job: str) -> pb.Continuation | None:
    """Return where the run stood when this job took it up; None for a job that started anew."""
    file = job_folder(data_dir, job) / CONTINUATION
    return json_format.Parse(file.read_text(encoding="utf-8"), pb.Continuation()) if file.is_file() else None


def drop_earlier_checkpoints(context: JobContext, run: str) -> None:
    """Delete the checkpoints of the run's ended jobs, on this machine and in the store."""
    jobs = _ended_jobs(context, run)
    for stored in published_checkpoints(context.library, run, jobs):
        context.library.delete(stored.ref)
    for job in jobs:
        folder = checkpoints_folder(context.settings.data_dir, job)
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            context.note(f"deleted the checkpoints of {job}", reason="CHECKPOINTS_DELETED")


def _ended_jobs(context: JobContext, run: str) -> list[str]:
    jobs, _ = open_table(context.database).page(
        kind_prefix="trainer.train", states=list(ENDED), labels={RUN_LABEL: run}, page_size=500
    )
    return [job.name for job in jobs if job.name != context.job]


def _refuse_finished(run: str, state: dict, epochs: float, max_steps: int) -> None:
    step, done = int(state.get("global_step") or 0), float(state.get("epoch") or 0.0)
    if max_steps and step >= max_steps:
        reached, field = f"{step} steps", f"parameters.max_steps above {step}"
    elif not max_steps and done >= epochs:
        reached, field = f"{done:g} epochs", f"parameters.epochs above {math.floor(done)}"
    else:
        return
    message = f"The run {run} has made {reached} already. Epochs and steps count from its beginning: set {field}."
    raise failed_precondition("NOTHING_LEFT_TO_TRAIN", message)
