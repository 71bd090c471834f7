"""Runs as the contract shows them: a name with all its jobs, newest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import Artifact
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, already_exists, failed_precondition
from loraline.core.jobs.model import state_name
from loraline.trainer import checkpoints
from loraline.trainer.batch_view import FILE_NAME as FIRST_BATCH
from loraline.trainer.batch_view import load_rows
from loraline.trainer.continuing import checkpoints_folder, job_folder, nothing_to_continue, standings
from loraline.trainer.differences import another_run
from loraline.trainer.published import figures_of, step_of

_LIVE = {job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_PAUSED}


def refuse_existing(
    request: pb.TrainRequest, jobs: list[job_pb2.Job], data_dir: Path, stored: Callable[[], list[Artifact]] = list
) -> LoralineError | None:
    """Return why a run of this name cannot be started, given the jobs of that name; None when it can.
    `stored` gives the checkpoints of those jobs that lie in the store.

    A request that was sent before is let through: the queue answers it with the job of then. Jobs that failed or were
    cancelled published nothing and block nothing.
    """
    if request.request_id and any(job.request_id == request.request_id for job in jobs):
        return None
    live = next((job for job in jobs if job.state in _LIVE), None)
    done = next((job for job in jobs if job.state == job_pb2.JOB_STATE_SUCCEEDED), None)
    if request.existing_run not in (pb.EXISTING_RUN_POLICY_UNSPECIFIED, pb.EXISTING_RUN_POLICY_FAIL):
        if live is not None:
            return _active(request, live)
        if request.existing_run == pb.EXISTING_RUN_POLICY_CONTINUE:
            return _not_continuable(request, jobs, data_dir, stored())
        return None
    holder = live or done
    if holder is None:
        return None
    message = (
        f"The run {request.name} exists ({holder.name}). Choose existing_run: CONTINUE goes on from its last good "
        "checkpoint (epochs count from the run's beginning), OVERWRITE deletes its checkpoints and starts anew, "
        "BACKUP_AND_RESTART keeps them and starts anew; published versions of the adapter stay. Or take another name."
    )
    return already_exists("RUN_EXISTS", message, job=holder.name, choices="CONTINUE,OVERWRITE,BACKUP_AND_RESTART")


def _not_continuable(
    request: pb.TrainRequest, jobs: list[job_pb2.Job], data_dir: Path, stored: list[Artifact]
) -> LoralineError | None:
    newest = next(standings(jobs, data_dir, stored), None)
    if newest is None:
        return nothing_to_continue(request.name)
    before = pb.TrainRequest()
    newest.job.spec.Unpack(before)
    return another_run(before, request)


def _active(request: pb.TrainRequest, live: job_pb2.Job) -> LoralineError:
    way = "Cancel it first"
    if request.existing_run == pb.EXISTING_RUN_POLICY_CONTINUE:
        way = "Resume it" if live.state == job_pb2.JOB_STATE_PAUSED else "Wait for its end"
    command = {"Cancel it first": "cancel", "Resume it": "resume", "Wait for its end": "watch"}[way]
    stands = f"{state_name(live.state)}: {live.name}"
    message = f"The run {request.name} has a job that is {stands}. {way}: `loraline jobs {command} {live.name}`."
    return failed_precondition("RUN_ACTIVE", message, job=live.name)


def run_of(name: str, jobs: list[job_pb2.Job], data_dir: Path, stored: Iterable[Artifact] = ()) -> pb.Run:
    """Return a run from its jobs, newest first, and from its checkpoints in the store."""
    newest = jobs[0]
    run = pb.Run(name=name, job=newest.name, state=newest.state)
    run.update_time.CopyFrom(newest.end_time if newest.HasField("end_time") else newest.create_time)
    for ref in (ref for job in jobs for ref in job.outputs):
        if ref.kind == artifact_pb2.ARTIFACT_KIND_ADAPTER and not run.HasField("adapter"):
            run.adapter.CopyFrom(ref)
        elif ref.kind == artifact_pb2.ARTIFACT_KIND_MODEL and not run.HasField("model"):
            run.model.CopyFrom(ref)
    found = {checkpoint.step: checkpoint for checkpoint in _checkpoints(checkpoints_folder(data_dir, newest.name))}
    for artifact in (artifact for artifact in stored if artifact.job == newest.name):
        checkpoint = found.setdefault(step_of(artifact), _from_store(artifact))
        checkpoint.artifact.CopyFrom(artifact.ref)
    run.checkpoints.extend(found[step] for step in sorted(found, reverse=True))
    return run


def first_batch(job: job_pb2.Job, data_dir: Path) -> list[pb.BatchRow]:
    """Return what the model was shown first: from the job's result, else from its folder on this machine."""
    result = pb.TrainResult()
    if job.result.Unpack(result) and result.first_batch:
        return list(result.first_batch)
    return load_rows(job_folder(data_dir, job.name) / FIRST_BATCH)


def _from_store(artifact: Artifact) -> pb.Checkpoint:
    figures = figures_of(artifact)
    return pb.Checkpoint(step=step_of(artifact), epoch=figures.get("epoch", 0.0), loss=figures.get("loss", 0.0))


def _checkpoints(folder: Path) -> Iterable[pb.Checkpoint]:
    """Return the sealed checkpoints on this machine, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / checkpoints.SEAL).is_file()]
    for path in sorted(found, key=checkpoints.step_of, reverse=True):
        state = checkpoints.trainer_state(path)
        losses = [entry for entry in state.get("log_history", []) if "loss" in entry]
        evaluations = [entry for entry in state.get("log_history", []) if "eval_loss" in entry]
        checkpoint = pb.Checkpoint(step=checkpoints.step_of(path), epoch=float(state.get("epoch") or 0.0))
        if losses:
            checkpoint.loss = float(losses[-1]["loss"])
        if evaluations:
            checkpoint.eval_loss = float(evaluations[-1]["eval_loss"])
        yield checkpoint
