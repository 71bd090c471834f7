"""Signs from what a run leaves besides its curve, and advice for runs that count in steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2 as ap
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.trainer import checkpoints
from loraline.trainer.continuing import checkpoints_folder
from loraline.trainer.diagnosis.advice import config_patch
from loraline.trainer.diagnosis.history import History, Point, to_curve
from loraline.trainer.diagnosis.judging import judge
from loraline.trainer.diagnosis.sign import Facts, Sign, facts_of
from loraline.trainer.diagnosis.subject import diagnose, from_jobs
from loraline.trainer.spec import resolve, training_spec

STEADY = History(tuple(Point(step, 0.2, 0.96, 1e-4, 1.0) for step in range(1, 31)))
OVERFIT = History(
    tuple(Point(step, 2.0 * math.exp(-step / 15), 0.96) for step in range(1, 101)),
    tuple((step, 1.0 + abs(step - 40) / 50) for step in range(10, 101, 10)),
    epochs=10.0,
)
SETTLED = History(tuple(Point(step, 0.8 + 2.0 * math.exp(-step / 8), 0.7) for step in range(1, 101)))


def signs(facts: Facts, history: History = STEADY) -> dict[str, Sign]:
    return {sign.code: sign for sign in judge(history, facts).signs}


def batch(prefix: int, tail: int, rows: int = 4) -> list[pb.BatchRow]:
    """Rows that begin with the same tokens and go on with others."""
    found = []
    for row in range(rows):
        ids = [*range(prefix), *(900 + row + at for at in range(tail))]
        found.append(pb.BatchRow(token_ids=ids, tokens=["a"] * len(ids), trained=[False] * len(ids), length=len(ids)))
    return found


def test_a_system_prompt_in_every_row_is_remarked() -> None:
    found = signs(Facts(first_batch=batch(60, 40)))
    assert "PROMPTS_VARY" not in found and not found["PROMPT_REPEATED"].passed
    assert "same 60 tokens" in found["PROMPT_REPEATED"].message and "60%" in found["PROMPT_REPEATED"].message
    # It carries no loss, so that it does not change the verdict.
    assert judge(STEADY, Facts(first_batch=batch(60, 40))).verdict == pb.VERDICT_GOOD


def test_what_a_template_begins_every_row_with_is_no_system_prompt() -> None:
    for rows in (batch(8, 10), batch(20, 200)):
        assert "PROMPT_REPEATED" not in signs(Facts(first_batch=rows))
        assert signs(Facts(first_batch=rows))["PROMPTS_VARY"].passed
    # Of one row, or of one row again and again, nothing can be said.
    for rows in ([], batch(60, 40, rows=1), batch(60, 40, rows=1) * 5):
        assert not {"PROMPT_REPEATED", "PROMPTS_VARY"} & set(signs(Facts(first_batch=rows)))


def test_going_on_is_on_the_checklist() -> None:
    went_on = signs(Facts(resumed_from="checkpoint-30"))["CONTINUED"]
    assert went_on.passed and "checkpoint-30" in went_on.message and went_on.phase == pb.RUN_PHASE_DURING
    assert "CONTINUED" not in signs(Facts())
    # One that says it went on but whose loss is back at its start did not.
    back = History(
        (*(Point(step, 3.0 * 0.8**step) for step in range(15)), *(Point(step, 3.0) for step in range(15, 30)))
    )
    assert {"RESTARTED"} == {"RESTARTED", "CONTINUED"} & set(signs(Facts(resumed_from="checkpoint-15"), back))


def result() -> pb.TrainResult:
    made = ap.ArtifactRef(kind=ap.ARTIFACT_KIND_ADAPTER, name="mareva", version=3, digest="sha256:00")
    answer = pb.TrainResult(adapter=made, first_batch=batch(60, 40))
    answer.receipt.rows, answer.receipt.trained_tokens, answer.probes.probes = 600, 9000, 8
    answer.receipt.rows_teaching_eos = 600
    answer.probes.max_abs_logprob_shift = 2.0
    return answer


def test_what_was_published_is_on_the_checklist() -> None:
    whole = signs(facts_of(result()))
    assert whole["FILES_COMPLETE"].passed and "adapter/mareva:v3" in whole["FILES_COMPLETE"].message
    assert whole["FILES_COMPLETE"].phase == pb.RUN_PHASE_AFTER
    assert "PROMPT_REPEATED" in whole
    assert not {"FILES_COMPLETE", "FILES_MISSING"} & set(signs(Facts()))


def test_what_is_missing_of_it_is_named() -> None:
    torn = result()
    torn.ClearField("probes")
    assert "lacks probes" in signs(facts_of(torn))["FILES_MISSING"].message
    torn.ClearField("adapter")
    assert "lacks weights in the store, probes" in signs(facts_of(torn))["FILES_MISSING"].message


def test_advice_for_a_run_that_counts_steps_is_in_steps() -> None:
    """max_steps overrides epochs: a patch of epochs would run as before."""
    asked = pb.TrainRequest(parameters=pb.TrainingParameters(max_steps=100))
    now = resolve(asked).parameters
    overfit = config_patch(judge(OVERFIT), OVERFIT, now)
    assert judge(OVERFIT).verdict == pb.VERDICT_OVERFIT
    assert overfit["max_steps"] == 40 and "epochs" not in overfit
    settled = config_patch(judge(SETTLED), SETTLED, now)
    assert settled == {"max_steps": 150, "lora": {"r": 32, "alpha": 64.0}}
    in_epochs = config_patch(judge(OVERFIT), OVERFIT, resolve(pb.TrainRequest()).parameters)
    assert in_epochs["epochs"] == 4.0 and "max_steps" not in in_epochs


PAIRS = History(tuple(Point(step, 0.69 * math.exp(-step / 60), 0.4, 2e-5, 1.0) for step in range(60)))


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.95, pb.VERDICT_GOOD), (0.7, pb.VERDICT_FAIR), (0.5, pb.VERDICT_UNDERTRAINED)]
)
def test_a_run_on_pairs_is_judged_by_its_rewards(share: float, verdict: pb.Verdict.ValueType) -> None:
    """Its loss and the token accuracy, 0.25 and 0.4 at the end here, are in no band of answers."""
    made = result()
    made.preference.reward_accuracy = share
    judgement = judge(PAIRS, facts_of(made))
    codes = {sign.code: sign.passed for sign in judgement.signs}
    assert judgement.verdict == verdict
    assert codes["REWARD_ACCURACY"] == (share > 0.8)
    assert not {"FINAL_LOSS", "TOKEN_ACCURACY"} & codes.keys()
    asked = pb.TrainRequest(objective=pb.OBJECTIVE_DPO)
    patch = config_patch(judgement, PAIRS, resolve(asked).parameters)
    json_format.ParseDict(patch, asked.parameters)
    training_spec(asked)
    assert bool(patch) == (share < 0.8)


def job(name: str, *, ended: bool) -> job_pb2.Job:
    made = job_pb2.Job(name=name)
    made.spec.Pack(pb.TrainRequest(objective=pb.OBJECTIVE_DPO))
    if ended:
        answer = result()
        answer.loss_curve.extend(to_curve(PAIRS))
        answer.preference.reward_accuracy = 0.9
        made.result.Pack(answer)
    return made


def test_a_second_run_on_pairs_did_not_start_anew_for_its_first_loss(tmp_path: Path) -> None:
    subject = from_jobs("mareva", [job("jobs/2", ended=True), job("jobs/1", ended=True)], tmp_path)
    answer = diagnose(subject)
    assert answer.verdict == pb.VERDICT_GOOD
    assert "STARTED_ANEW" not in {reason.code for reason in answer.reasons}


def test_a_run_that_goes_on_is_judged_by_its_newest_sealed_checkpoint(tmp_path: Path) -> None:
    """Its job has no result yet; what was logged up to the checkpoint is its curve."""
    running = job_pb2.Job(name="jobs/2", state=job_pb2.JOB_STATE_RUNNING)
    parameters = pb.TrainingParameters(epochs=4, lora=pb.LoraParameters(r=8))
    running.spec.Pack(pb.TrainRequest(name="mareva", parameters=parameters))
    with pytest.raises(LoralineError) as caught:
        from_jobs("mareva", [running], tmp_path)
    assert (caught.value.reason, caught.value.code.name) == ("RUN_WITHOUT_HISTORY", "FAILED_PRECONDITION")
    assert "jobs/2" in caught.value.message and caught.value.metadata["job"] == "jobs/2"
    log = [{"step": point.step, "loss": point.loss, "mean_token_accuracy": 0.7} for point in SETTLED.points]
    log.insert(50, {"step": 50, "eval_loss": 0.9})
    for step in (50, 100):
        folder = checkpoints_folder(tmp_path, "jobs/2") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = {"log_history": [entry for entry in log if entry["step"] <= step], "epoch": step / 50}
        (folder / "trainer_state.json").write_text(json.dumps({**state, "num_train_epochs": 4}))
        if step == 50:
            checkpoints.seal(folder)
    # The one without a seal is being written: what it holds does not count yet.
    assert len(diagnose(from_jobs("mareva", [running], tmp_path)).loss_curve) == 50
    checkpoints.seal(folder)
    subject = from_jobs("mareva", [running], tmp_path)
    assert (subject.history.epochs, subject.history.planned_epochs, subject.parameters.lora.r) == (2.0, 4.0, 8)
    answer = diagnose(subject)
    assert [(point.step, point.loss) for point in answer.loss_curve] == [
        (point.step, pytest.approx(point.loss)) for point in SETTLED.points
    ]
    assert [point.step for point in answer.loss_curve if point.HasField("eval_loss")] == [50]
    assert answer.verdict == pb.VERDICT_UNDERTRAINED
    # Its adapter is not published yet, which is no fault.
    assert not {"FILES_MISSING", "FILES_COMPLETE"} & {reason.code for reason in answer.reasons}


def test_a_run_on_pairs_that_has_not_ended_is_not_judged(tmp_path: Path) -> None:
    folder = checkpoints_folder(tmp_path, "jobs/2") / "checkpoint-60"
    folder.mkdir(parents=True)
    log = [{"step": point.step, "loss": point.loss} for point in PAIRS.points]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    checkpoints.seal(folder)
    with pytest.raises(LoralineError) as caught:
        from_jobs("mareva", [job("jobs/2", ended=False)], tmp_path)
    assert caught.value.reason == "NOT_SUPPORTED" and "before it has ended" in caught.value.message
