"""A run's checkpoints from one job to the next: brought along by CONTINUE, deleted by OVERWRITE."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from google.protobuf import json_format

from loraline.api.artifact.v1.artifact_pb2 import Artifact
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.model import ENDED, SUCCEEDED
from loraline.core.jobs.sql_table import open_table
from loraline.trainer import checkpoints
from loraline.trainer.differences import another_run, told_differences
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


def nothing_to_continue(run: str) -> LoralineError:
    """Return FAILED_PRECONDITION (NO_CHECKPOINT)."""
    message = (
        f"The run {run} has no good checkpoint on this machine or in the store, so that nothing can be continued. "
        "Start it anew with existing_run BACKUP_AND_RESTART, or on the machine that holds its checkpoints."
    )
    return failed_precondition("NO_CHECKPOINT", message)


@dataclass(frozen=True)
class Standing:
    """Where a job of a run came to: its checkpoints on this machine (the newest good one) and in the store.

    One of them there is.
    """

    job: job_pb2.Job
    here: Path | None
    stored: Sequence[Artifact]


def standings(jobs: Sequence[job_pb2.Job], data_dir: Path, stored: Sequence[Artifact]) -> Iterator[Standing]:
    """Yield those of a run's jobs that left a checkpoint; `jobs` are newest first, `stored` has most steps first.

    The newest job comes first, however far an older one came: it may have begun the run anew.
    """
    for job in jobs:
        here, _ = checkpoints.newest_good(checkpoints_folder(data_dir, job.name))
        in_store = [artifact for artifact in stored if artifact.job == job.name]
        if here is not None or in_store:
            yield Standing(job, here, in_store)


def bring_checkpoint(context: JobContext, request: pb.TrainRequest) -> None:
    """Copy the run's last good checkpoint into this job's folder, whole or not at all, and say where the run stands.

    It is that of the run's newest job that has one, from this machine or from the store, whichever is further. Does
    nothing when this job has a checkpoint of its own already: then it was interrupted and goes on from there. Raises
    FAILED_PRECONDITION: NO_CHECKPOINT; CONTINUE_DIFFERS when that job trained something else; NOTHING_LEFT_TO_TRAIN
    when the run has reached what is asked for and was published.
    """
    run, own = request.name, checkpoints_folder(context.settings.data_dir, context.job)
    if checkpoints.newest_good(own)[0] is not None or published_checkpoints(context.library, run, {context.job}):
        return
    jobs = _ended_jobs(context, run)
    stored = published_checkpoints(context.library, run, {job.name for job in jobs})
    for stands in standings(jobs, context.settings.data_dir, stored):
        before = pb.TrainRequest()
        stands.job.spec.Unpack(before)
        if refusal := another_run(before, request):
            raise refusal
        brought = _bring(context, stands, own)
        if brought is not None:
            _take_up(context, request, before, brought, published=stands.job.state == SUCCEEDED)
            return
    raise nothing_to_continue(run)


def _bring(context: JobContext, stands: Standing, own: Path) -> Path | None:
    """Copy a job's furthest checkpoint, or the next where that one turns out to be damaged; None if all are."""
    ways = {(step_of(one), 0): partial(bring, context.library, one, own) for one in stands.stored}
    if (here := stands.here) is not None:
        ways[checkpoints.step_of(here), 1] = partial(place, here, here.name, own)
    for way in sorted(ways, reverse=True):  # at the same step the one on this machine
        try:
            return ways[way]()
        except LoralineError as error:
            if error.code is not grpc.StatusCode.DATA_LOSS:
                raise
            remark = f"checkpoint-{way[0]} of {stands.job.name}: {error.message}"
            context.note(remark, severity="warning", reason=error.reason)
    return None


def _take_up(
    context: JobContext, request: pb.TrainRequest, before: pb.TrainRequest, brought: Path, *, published: bool
) -> None:
    """Refuse a run that has nothing left to do; else write down and tell where it stands."""
    p, state = request.parameters, checkpoints.trainer_state(brought)
    # A run that came to its end without publishing anything, for want of memory say, still has that to do.
    same_end = (p.epochs, p.max_steps) == (before.parameters.epochs, before.parameters.max_steps)
    if published or not same_end:
        try:
            _refuse_finished(request.name, state, p.epochs, p.max_steps)
        except LoralineError:
            checkpoints.remove([brought])
            raise
    stands = standing(brought.name, state, 0.0 if p.max_steps else p.epochs)
    file = brought.parent.parent / CONTINUATION
    file.write_text(json_format.MessageToJson(stands) + "\n", encoding="utf-8")
    context.note(told(stands), reason="RUN_CONTINUED", checkpoint=brought.name)
    if changed := told_differences(before, request):
        context.note(changed, severity="warning", reason="RUN_CONTINUED_OTHERWISE")


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
    jobs = [job.name for job in _ended_jobs(context, run)]
    for stored in published_checkpoints(context.library, run, jobs):
        context.library.delete(stored.ref)
    for job in jobs:
        folder = checkpoints_folder(context.settings.data_dir, job)
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            context.note(f"deleted the checkpoints of {job}", reason="CHECKPOINTS_DELETED")


def _ended_jobs(context: JobContext, run: str) -> list[job_pb2.Job]:
    """Return the run's other jobs that have ended, newest first."""
    jobs, _ = open_table(context.database).page(
        kind_prefix="trainer.train", states=list(ENDED), labels={RUN_LABEL: run}, page_size=500
    )
    return [job for job in jobs if job.name != context.job]


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
