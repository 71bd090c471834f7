"""Which checkpoint CONTINUE takes, what it refuses, and when OVERWRITE gives the earlier ones up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.model import FAILED, SUCCEEDED, JobEnd, NewJob
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.trainer import checkpoints, job
from loraline.trainer.continuing import RUN_LABEL, bring_checkpoint, checkpoints_folder, continuation
from loraline.trainer.differences import another_run, told_differences
from loraline.trainer.runs import refuse_existing
from loraline.trainer.servicer import TRAIN
from loraline.trainer.spec import resolve
from loraline.trainer.testing import harbour_rows, write_rows

CONTINUE, OVERWRITE = pb.EXISTING_RUN_POLICY_CONTINUE, pb.EXISTING_RUN_POLICY_OVERWRITE


@pytest.fixture
def platform(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    bases = [tmp_path_factory.getbasetemp()]
    opened = open_platform(CoreSettings(data_dir=tmp_path / "data", allowed_paths=bases, auth="off"))
    yield opened
    opened.database.close()


def request(policy: Any = 0, **fields: Any) -> pb.TrainRequest:
    parameters = pb.TrainingParameters(**{"epochs": 4, **fields.pop("parameters", {})})
    base = fields.pop("base_model", pb.BaseModel(path="/models/small"))
    return resolve(
        pb.TrainRequest(name="mareva", base_model=base, parameters=parameters, existing_run=policy, **fields)
    )


def begun(platform: Platform, wanted: pb.TrainRequest) -> JobContext:
    """Return what the process of a new job sees, its lease held."""
    platform.jobs.table.create(NewJob(TRAIN.kind, wanted, labels={RUN_LABEL: wanted.name}))
    claim = platform.jobs.table.claim([TRAIN.kind], "me", 300)
    assert claim is not None
    workdir = platform.settings.data_dir / "jobs" / claim.name
    workdir.mkdir(parents=True, exist_ok=True)
    return JobContext(
        job=claim.name, kind=claim.kind, attempt=claim.attempt, epoch=claim.epoch, settings=platform.settings,
        library=platform.library, database=platform.database, table=platform.jobs.table, workdir=workdir,
    )  # fmt: skip


def checkpoint(folder: Path, step: int, *, epoch: float = 1.0) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    state = {"global_step": step, "epoch": epoch, "log_history": [{"loss": 1.0, "step": step}]}
    (made / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.seal(made)
    return made


def ended(
    platform: Platform,
    wanted: pb.TrainRequest,
    *steps: int,
    epoch: float = 1.0,
    state: int = FAILED,
    store: bool = False,
) -> str:
    """Have a job make checkpoints at these steps and end; return its name. `store` puts them into the store alone."""
    context = begun(platform, wanted)
    for step in steps:
        made = checkpoint(checkpoints_folder(platform.settings.data_dir, context.job), step, epoch=epoch)
        if store:
            context.publish(ap.ARTIFACT_KIND_CHECKPOINT, wanted.name, made, facts={"step": step, "epoch": epoch})
            checkpoints.remove([made])
    platform.jobs.table.finish(context.job, context.epoch, JobEnd(state))
    return context.job


def taken(platform: Platform, wanted: pb.TrainRequest) -> tuple[str, list[str]]:
    """Return the name of the checkpoint that a job goes on from, and the reasons of its remarks."""
    context = begun(platform, wanted)
    bring_checkpoint(context, wanted)
    good, _ = checkpoints.newest_good(checkpoints_folder(platform.settings.data_dir, context.job))
    assert good is not None
    stands = continuation(platform.settings.data_dir, context.job)
    assert stands is not None and stands.checkpoint == good.name
    events, _ = platform.jobs.table.events(context.job)
    return good.name, [event.note.reason for event in events if event.note.reason]


def test_a_run_begun_anew_is_continued_and_not_the_one_before(platform: Platform) -> None:
    ended(platform, request(), 900, 1000, store=True)
    ended(platform, request(pb.EXISTING_RUN_POLICY_BACKUP_AND_RESTART), 200, 300, store=True)
    assert taken(platform, request(CONTINUE))[0] == "checkpoint-300"


def test_of_one_job_the_further_checkpoint_is_taken_wherever_it_lies(platform: Platform) -> None:
    name = ended(platform, request(), 20, 30, store=True)
    checkpoint(checkpoints_folder(platform.settings.data_dir, name), 10)
    assert taken(platform, request(CONTINUE))[0] == "checkpoint-30"
    checkpoint(checkpoints_folder(platform.settings.data_dir, name), 40)
    assert taken(platform, request(CONTINUE))[0] == "checkpoint-40"


def test_a_damaged_checkpoint_in_the_store_gives_way_to_the_one_before(platform: Platform) -> None:
    name = ended(platform, request(), 10, store=True)
    torn = checkpoint(checkpoints_folder(platform.settings.data_dir, name), 20)
    (torn / "trainer_state.json").write_text("{}")
    platform.library.publish(ap.ARTIFACT_KIND_CHECKPOINT, "mareva", torn, facts={"step": 20}, job=name)
    checkpoints.remove([torn])
    good, notes = taken(platform, request(CONTINUE))
    assert good == "checkpoint-10"
    assert "CHECKPOINT_DAMAGED" in notes


def test_a_job_that_left_nothing_gives_way_to_the_one_before(platform: Platform) -> None:
    ended(platform, request(), 10)
    ended(platform, request(CONTINUE))
    assert taken(platform, request(CONTINUE))[0] == "checkpoint-10"


@pytest.mark.parametrize(("state", "refused"), [(SUCCEEDED, True), (FAILED, False)])
def test_a_run_at_its_end_is_gone_on_with_only_to_publish_it(platform: Platform, state: int, *, refused: bool) -> None:
    ended(platform, request(), 24, epoch=4.0, state=state)
    if not refused:
        assert taken(platform, request(CONTINUE))[0] == "checkpoint-24"
        return
    with pytest.raises(LoralineError) as caught:
        taken(platform, request(CONTINUE))
    assert caught.value.reason == "NOTHING_LEFT_TO_TRAIN"


OTHERWISE = [
    ({"base_model": pb.BaseModel(path="/models/large")}, "base_model"),
    ({"method": pb.METHOD_DORA}, "method"),
    ({"objective": pb.OBJECTIVE_DPO}, "objective"),
    ({"parameters": {"lora": pb.LoraParameters(r=4)}}, "parameters.lora.r"),
    ({"parameters": {"lora": pb.LoraParameters(alpha=8)}}, "parameters.lora.alpha"),
    ({"parameters": {"lora": pb.LoraParameters(target_modules=["q_proj"])}}, "parameters.lora.target_modules"),
]


@pytest.mark.parametrize(("changed", "field"), OTHERWISE)
def test_another_model_is_not_gone_on_with(platform: Platform, changed: dict[str, Any], field: str) -> None:
    ended(platform, request(), 10)
    context = begun(platform, request(CONTINUE, **changed))
    with pytest.raises(LoralineError) as caught:
        bring_checkpoint(context, request(CONTINUE, **changed))
    assert caught.value.reason == "CONTINUE_DIFFERS"
    assert field in caught.value.message
    assert list(checkpoints_folder(platform.settings.data_dir, context.job).glob("*")) == []


def test_another_model_is_refused_at_submit_already(platform: Platform) -> None:
    name = ended(platform, request(), 10)
    jobs = [platform.jobs.table.get(name)]
    refused = refuse_existing(request(CONTINUE, method=pb.METHOD_DORA), jobs, platform.settings.data_dir)
    assert refused is not None and refused.reason == "CONTINUE_DIFFERS"
    assert refuse_existing(request(CONTINUE), jobs, platform.settings.data_dir) is None


def test_other_data_and_settings_are_told_by_name(platform: Platform) -> None:
    ended(platform, request(), 10)
    other = request(CONTINUE, parameters={"batch_size": 2, "epochs": 9}, validation_fraction=0.1)
    other.datasets.add(ref=ap.ArtifactRef(kind=ap.ARTIFACT_KIND_DATASET, name="harbour", version=2), weight=5)
    good, notes = taken(platform, other)
    assert (good, notes.count("RUN_CONTINUED_OTHERWISE")) == ("checkpoint-10", 1)
    told = told_differences(request(), other)
    assert "parameters.batch_size was 4, now 2" in told
    assert "validation_fraction was 0.0, now 0.1" in told
    assert "harbour" in told and "epochs" not in told
    assert told_differences(request(), request(CONTINUE, parameters={"epochs": 9})) == ""


def test_the_same_model_elsewhere_is_no_other() -> None:
    moved = request(base_model=pb.BaseModel(path="/data/hub/small"))
    assert another_run(request(), moved) is None
    assert another_run(request(), request(base_model=pb.BaseModel(hub_id="org/small"))) is None
    revisions = [request(base_model=pb.BaseModel(hub_id="org/small", revision=name)) for name in ("v1", "v2")]
    refused = another_run(*revisions)
    assert refused is not None and "org/small@v1" in refused.message


@pytest.mark.slow
def test_overwrite_gives_nothing_up_before_it_has_made_a_step(
    platform: Platform, small_base: Path, tmp_path: Path
) -> None:
    """Rows that turn out too long, after everything else was found in order; then settings that fit them."""
    rows = write_rows(tmp_path / "rows", harbour_rows(8))
    ref = platform.library.publish(ap.ARTIFACT_KIND_DATASET, "harbour", rows).ref
    whole = {"base_model": pb.BaseModel(path=str(small_base)), "datasets": [pb.WeightedDataset(ref=ref)]}
    lora = pb.LoraParameters(r=4)
    earlier = checkpoints_folder(platform.settings.data_dir, ended(platform, request(), 10))
    ended(platform, request(), 11, store=True)

    def left() -> tuple[bool, int]:
        page, _ = platform.library.list(kind=ap.ARTIFACT_KIND_CHECKPOINT, name="mareva")
        return (earlier / "checkpoint-10").is_dir(), len(page)

    bad = request(OVERWRITE, parameters={"max_length": 8, "lora": lora}, **whole)
    context = begun(platform, bad)
    with pytest.raises(LoralineError) as caught:
        job.train(context, bad)
    assert (caught.value.reason, left()) == ("ROWS_TOO_LONG", (True, 1))
    platform.jobs.table.finish(context.job, context.epoch, JobEnd(FAILED))
    good = request(OVERWRITE, parameters={"max_steps": 2, "learning_rate": 5e-3, "lora": lora}, **whole)
    result = job.train(begun(platform, good), good)
    assert (result.steps, left()) == (2, (False, 0))
