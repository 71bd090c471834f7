"""What is judged: a run of this platform with what it is known of it, or a trainer_state.json from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format, struct_pb2

from loraline.api.artifact.v1.artifact_pb2 import Artifact
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, failed_precondition, unsupported
from loraline.trainer import checkpoints
from loraline.trainer.continuing import checkpoints_folder
from loraline.trainer.diagnosis.advice import config_patch
from loraline.trainer.diagnosis.history import History, from_curve, from_state, from_trainer_state, to_curve
from loraline.trainer.diagnosis.judging import judge
from loraline.trainer.diagnosis.larger_base import larger_base
from loraline.trainer.diagnosis.page import html_page
from loraline.trainer.diagnosis.sign import Facts, Sign, facts_of
from loraline.trainer.runs import first_batch
from loraline.trainer.spec import resolve


@dataclass(frozen=True)
class Subject:
    """A run to be judged."""

    title: str
    history: History
    facts: Facts
    parameters: pb.TrainingParameters
    """Its settings with defaults written out."""
    base: pb.BaseModel = field(default_factory=pb.BaseModel)
    """What it was trained on; empty where that is unknown."""


def diagnose(subject: Subject, models: Sequence[Artifact] = ()) -> pb.DiagnoseResponse:
    """Return the judgement with a patch and a page; of the store's `models` a larger base may be advised."""
    judgement = judge(subject.history, subject.facts)
    patch = config_patch(judgement, subject.history, subject.parameters)
    larger = larger_base(judgement, subject.parameters, subject.base, models)
    answer = pb.DiagnoseResponse(
        verdict=judgement.verdict,
        reasons=[_reason(sign) for sign in judgement.signs],
        loss_curve=to_curve(subject.history),
        html=html_page(subject.title, judgement, subject.history, patch, subject.facts, larger),
        base_model=larger,
        samples=subject.facts.samples,
    )
    if patch:
        answer.config_patch.CopyFrom(json_format.ParseDict(patch, struct_pb2.Struct()))
    return answer


def from_file(content: bytes) -> Subject:
    """Return the run in a trainer_state.json; its settings are unknown, so that advice starts from the defaults."""
    return Subject("trainer_state.json", from_trainer_state(content), Facts(), resolve(pb.TrainRequest()).parameters)


def from_jobs(name: str, jobs: Sequence[job_pb2.Job], data_dir: Path) -> Subject:
    """Return a run of this platform from its jobs, newest first.

    Raises FAILED_PRECONDITION (RUN_WITHOUT_HISTORY) while none of them has logged a step that is kept; UNIMPLEMENTED
    (NOT_SUPPORTED) for a run on preference pairs that has not ended: what it learns by are its rewards.
    """
    known = [(job, history) for job in jobs if (history := _history(job, data_dir)) is not None]
    if not known:
        message = (
            f"The run {name} has no loss curve yet: its job {jobs[0].name} has neither ended nor saved a checkpoint on "
            f"this machine. Follow it with `loraline jobs watch {jobs[0].name}` and ask again."
        )
        raise failed_precondition("RUN_WITHOUT_HISTORY", message, job=jobs[0].name)
    job, history = known[0]
    request, result = pb.TrainRequest(), pb.TrainResult()
    job.spec.Unpack(request)
    ended, pairs = job.result.Unpack(result), request.objective == pb.OBJECTIVE_DPO
    if pairs and not ended:
        remedy = "Read reward_accuracy and reward_margin in its progress: their growth is what it learns by."
        raise unsupported("Judging a run of OBJECTIVE_DPO before it has ended", remedy)
    # The loss on pairs begins at 0.69 every time: that it does so again says nothing.
    earlier = [] if pairs else [other for _, other in known[1:]]
    if ended:
        facts = facts_of(result, earlier=earlier, rank=request.parameters.lora.r)
    else:
        facts = Facts(earlier=earlier, first_batch=first_batch(job, data_dir))
    return Subject(f"Run {name}", history, facts, resolve(request).parameters, request.base_model)


def _history(job: job_pb2.Job, data_dir: Path) -> History | None:
    """Return what a job logged: from its result, else from its newest checkpoint on this machine."""
    request, result = pb.TrainRequest(), pb.TrainResult()
    job.spec.Unpack(request)
    planned = request.parameters.epochs
    if job.result.Unpack(result) and result.loss_curve:
        return from_curve(result.loss_curve, epochs=result.epochs, planned_epochs=planned)
    newest, _ = checkpoints.newest_good(checkpoints_folder(data_dir, job.name))
    if newest is None:
        return None
    try:
        return from_state(checkpoints.trainer_state(newest))
    except LoralineError:
        return None


def _reason(sign: Sign) -> pb.PlanCheck:
    severity = job_pb2.SEVERITY_ERROR if sign.grave else job_pb2.SEVERITY_WARNING
    return pb.PlanCheck(
        code=sign.code,
        severity=job_pb2.SEVERITY_INFO if sign.passed else severity,
        passed=sign.passed,
        message=sign.message,
        remedy=sign.remedy,
        phase=sign.phase,
    )
