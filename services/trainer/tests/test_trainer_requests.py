"""Requests: defaults, what is refused at submit, the serving contract, names in use, base models by path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER, ArtifactRef
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core import hub
from loraline.core.errors import LoralineError
from loraline.trainer import checkpoints
from loraline.trainer.base_models import resolve_base
from loraline.trainer.runs import refuse_existing, run_of
from loraline.trainer.spec import resolve, servability_problems, training_spec


def run(**fields: object) -> pb.TrainRequest:
    return pb.TrainRequest(name="mareva", base_model=pb.BaseModel(path="/base"), **fields)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_contract() -> None:
    spec = training_spec(run())
    assert (spec.epochs, spec.learning_rate, spec.batch_size, spec.grad_accum) == (3.0, 2e-4, 4, 1)
    assert (spec.max_length, spec.length_policy, spec.lr_scheduler, spec.warmup_ratio) == (
        1024,
        "error",
        "cosine",
        0.03,
    )
    assert (spec.lora.r, spec.lora.alpha, spec.max_truncated_share, spec.quantization) == (16, 32.0, 0.1, "auto")
    assert training_spec(run(parameters=pb.TrainingParameters(warmup_ratio=0.0))).warmup_ratio == 0.0
    assert resolve(resolve(run())) == resolve(run())


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (run(method=pb.METHOD_FULL, objective=pb.OBJECTIVE_DPO), "OBJECTIVE_DPO with METHOD_FULL"),
        (run(launcher=pb.LAUNCHER_RAY), "LAUNCHER_RAY"),
    ],
)
def test_what_is_not_served_is_refused_by_name(request_: pb.TrainRequest, named: str) -> None:
    with pytest.raises(LoralineError) as caught:
        training_spec(request_)
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ({"lora": pb.LoraParameters(r=8), "quantization": pb.QUANTIZATION_NF4}, {"lora", "quantization"}),
        ({"dpo_beta": 0.2}, {"dpo_beta"}),
    ],
)
def test_settings_of_another_method_are_named(asked: dict[str, object], fields: set[str]) -> None:
    with pytest.raises(LoralineError) as caught:
        training_spec(run(method=pb.METHOD_FULL, parameters=pb.TrainingParameters(**asked)))  # type: ignore[arg-type]
    assert caught.value.reason == "SETTINGS_CONTRADICT"
    assert set(caught.value.fields) == {f"parameters.{name}" for name in fields}


def test_pairs_take_no_packing_noise_or_splitting() -> None:
    parameters = pb.TrainingParameters(packing=True, neftune_alpha=5, length_policy=pb.LENGTH_POLICY_SPLIT)
    with pytest.raises(LoralineError) as caught:
        training_spec(run(objective=pb.OBJECTIVE_DPO, parameters=parameters))
    assert {name.rpartition(".")[2] for name in caught.value.fields} == {"packing", "neftune_alpha", "length_policy"}
    spec = training_spec(run(objective=pb.OBJECTIVE_DPO))
    assert (spec.preference, spec.dpo_beta, spec.learning_rate) == (True, 0.1, 2e-5)


def test_all_weights_have_no_rank() -> None:
    spec, filled = training_spec(run(method=pb.METHOD_FULL)), resolve(run(method=pb.METHOD_FULL))
    assert (spec.full, spec.learning_rate, filled.parameters.HasField("lora")) == (True, 2e-5, False)
    assert training_spec(filled) == spec
    contract = pb.ServingContract(max_lora_rank=8, target_modules=["q_proj"], vocab_size=2048)
    assert servability_problems(run(method=pb.METHOD_FULL, serving_contract=contract), vocab_size=2048) == []


@pytest.mark.parametrize(
    "parameters",
    [
        pb.TrainingParameters(lr_scheduler="zigzag"),
        pb.TrainingParameters(seed=-1),
        pb.TrainingParameters(report_to=["tensorboard", "fax"]),
    ],
)
def test_senseless_parameters_are_invalid(parameters: pb.TrainingParameters) -> None:
    with pytest.raises(LoralineError) as caught:
        training_spec(run(parameters=parameters))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.fields


def test_the_serving_contract_is_held_against_the_run() -> None:
    contract = pb.ServingContract(max_lora_rank=16, target_modules=["q_proj"], vocab_size=2048, max_model_len=512)
    lora = pb.LoraParameters(r=32, target_modules=["q_proj", "model.layers.0.mlp.up_proj"], modules_to_save=["lm_head"])
    asked = run(
        serving_contract=contract,
        method=pb.METHOD_DORA,
        parameters=pb.TrainingParameters(lora=lora, max_length=4096),
    )
    problems = "; ".join(servability_problems(asked, vocab_size=4096))
    for word in ("lora.r is 32", "up_proj", "modules_to_save", "METHOD_DORA", "4096 vocabulary", "max_length is 4096"):
        assert word in problems
    assert servability_problems(run(serving_contract=contract), vocab_size=2048) == []
    assert servability_problems(run(parameters=pb.TrainingParameters(lora=lora))) == []


def job(state: int, *, name: str = "trainer-train-1", request_id: str = "") -> job_pb2.Job:
    return job_pb2.Job(name=name, state=state, request_id=request_id)  # type: ignore[arg-type]


def refusal(request: pb.TrainRequest, *jobs: job_pb2.Job, data_dir: Path = Path("nowhere")) -> str:
    error = refuse_existing(resolve(request), list(jobs), data_dir)
    return error.reason if error else ""


def test_a_name_in_use_is_refused_with_the_choices() -> None:
    done, live = job(job_pb2.JOB_STATE_SUCCEEDED), job(job_pb2.JOB_STATE_RUNNING)
    assert refusal(run()) == ""
    assert refusal(run(), done) == refusal(run(), live) == "RUN_EXISTS"
    assert refusal(run(), job(job_pb2.JOB_STATE_FAILED), job(job_pb2.JOB_STATE_CANCELLED)) == ""
    for policy in (pb.EXISTING_RUN_POLICY_OVERWRITE, pb.EXISTING_RUN_POLICY_BACKUP_AND_RESTART):
        assert refusal(run(existing_run=policy), done) == ""
        assert refusal(run(existing_run=policy), live) == "RUN_ACTIVE"


def test_only_a_run_with_a_good_checkpoint_is_continued(tmp_path: Path) -> None:
    on = run(existing_run=pb.EXISTING_RUN_POLICY_CONTINUE)
    done, failed = job(job_pb2.JOB_STATE_SUCCEEDED, name="done"), job(job_pb2.JOB_STATE_FAILED, name="failed")
    assert refusal(on, data_dir=tmp_path) == refusal(on, done, failed, data_dir=tmp_path) == "NO_CHECKPOINT"
    folder = tmp_path / "jobs" / "failed" / "checkpoints" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    assert refusal(on, done, failed, data_dir=tmp_path) == "NO_CHECKPOINT"
    checkpoints.seal(folder)
    assert refusal(on, done, failed, data_dir=tmp_path) == ""
    paused = refuse_existing(resolve(on), [job(job_pb2.JOB_STATE_PAUSED), done], tmp_path)
    assert paused is not None
    assert "loraline jobs resume trainer-train-1" in paused.message


def test_the_same_request_sent_again_is_let_through() -> None:
    done = job(job_pb2.JOB_STATE_SUCCEEDED, request_id="one")
    assert refusal(run(request_id="one"), done) == ""
    assert refusal(run(request_id="two"), done) == "RUN_EXISTS"


def test_a_run_shows_its_newest_job_and_newest_adapter(tmp_path: Path) -> None:
    adapter = ArtifactRef(kind=ARTIFACT_KIND_ADAPTER, name="mareva", version=4)
    older = job(job_pb2.JOB_STATE_SUCCEEDED, name="old")
    older.outputs.append(adapter)
    found = run_of("mareva", [job(job_pb2.JOB_STATE_RUNNING, name="new"), older], tmp_path)
    assert (found.job, found.state, found.adapter) == ("new", job_pb2.JOB_STATE_RUNNING, adapter)


def resolve_path(path: Path | str, allowed: list[Path], **fields: object) -> object:
    return resolve_base(
        pb.BaseModel(path=str(path), **fields),  # type: ignore[arg-type]
        fetch=lambda ref: pytest.fail("no artifact was named"),
        allowed_paths=allowed,
        remote_code=[],
        download=lambda hub_id, revision: pytest.fail("no Hub id was named"),
    )


def refused_path(path: Path | str, allowed: list[Path], **fields: object) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        resolve_path(path, allowed, **fields)
    return caught.value


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    error = refused_path(tmp_path / "nowhere", [tmp_path])
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_PATH_MISSING")
    assert str(tmp_path / "nowhere") in error.message


def test_a_path_outside_is_refused_links_and_dots_included(tmp_path: Path) -> None:
    inside, outside = tmp_path / "models", tmp_path / "secret"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    for path in (outside, inside / ".." / "secret", inside / "link", "/etc"):
        assert refused_path(path, [inside]).reason == "PATH_NOT_ALLOWED"
    assert refused_path(outside, []).code is grpc.StatusCode.PERMISSION_DENIED


def test_an_incomplete_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert refused_path(model, [tmp_path]).reason == "MODEL_INCOMPLETE"
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"x")
    assert refused_path(model, [tmp_path]).reason == "MODEL_NOT_SAFETENSORS"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-00001-of-00002.safetensors").write_bytes(b"x")
    error = refused_path(model, [tmp_path])
    assert error.reason == "MODEL_SHARDS_MISSING"
    assert "model-00002-of-00002.safetensors" in error.message


def test_code_of_a_model_runs_only_when_the_operator_allowed_it(small_base: Path) -> None:
    error = refused_path(small_base, [small_base], trust_remote_code=True)
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "REMOTE_CODE_REFUSED")


def test_a_base_remembers_what_it_was(small_base: Path, tmp_path: Path) -> None:
    base = resolve_path(small_base, [small_base.parent])
    record = base.record()  # type: ignore[attr-defined]
    assert record["source"] == "path"
    assert record["path"] == str(small_base)
    copy = tmp_path / "copy"
    shutil.copytree(small_base, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    other = resolve_path(copy, [tmp_path]).record()  # type: ignore[attr-defined]
    assert other["config_sha256"] != record["config_sha256"]
    assert other["tokenizer_sha256"] == record["tokenizer_sha256"]


def test_an_unreachable_hub_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoralineError) as caught:
        hub.download("nobody/nothing", "v1")
    assert caught.value.reason == "HUB_NOT_CACHED"
    assert "nobody/nothing at revision v1" in caught.value.message


def test_the_servicer_loads_no_torch() -> None:
    code = (
        "import sys, loraline.trainer.component, loraline.trainer.job;"
        "found = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules);"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
