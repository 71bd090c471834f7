"""Histories that make each alert fire, and near ones that must not: the input of test_alerts.py.

Series are in promtool's notation, one sample a minute: `0x30` is 0 and 30 times more 0; `0+2x30` grows by 2.
A near one is what the alert is most easily mistaken for: too few, too short, another label, a healthy run.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINER = 'instance="t:9600",job="loraline",service="trainer"'
DATAGEN = 'instance="d:9600",job="loraline",service="datagen"'
MERGER = 'instance="m:9600",job="loraline",service="merger"'
INFERENCE = 'instance="i:9600",job="loraline",service="inference"'
RUN = f'{TRAINER},run="mareva",base_model="tiny"'
ENDPOINT = f'{DATAGEN},endpoint="main",model="m"'
UNBOUND = f'{DATAGEN},endpoint="",model=""'
STAGES = ("datagen", "trainer", "merger", "inference")
TTFT = "loraline_inference_time_to_first_token_seconds"


@dataclass(frozen=True)
class Case:
    """One history."""

    series: dict[str, str]
    minute: int
    """When the alert is looked for."""
    also: tuple[str, ...] = ()
    """Other alerts that fire rightly in this history."""
    gone: tuple[str, ...] = ()
    """Stages that Prometheus knows no server of; the others are up in every history that says nothing else."""


def _runs(verdict: str, values: str) -> dict[str, str]:
    return {f'loraline_trainer_runs_total{{{TRAINER},verdict="{verdict}"}}': values}


def _run(loss: str, steps: str, planned: str = "5000x200") -> dict[str, str]:
    return {
        f"loraline_training_loss{{{RUN}}}": loss,
        f"loraline_training_steps{{{RUN}}}": steps,
        f"loraline_training_steps_planned{{{RUN}}}": planned,
    }


def _rows(**outcomes: str) -> dict[str, str]:
    return {f'loraline_datagen_rows_total{{{DATAGEN},outcome="{name}"}}': values for name, values in outcomes.items()}


def _limits(errors: str, requests: str) -> dict[str, str]:
    return {
        f'loraline_datagen_quota_errors_total{{{ENDPOINT},reason="rate"}}': errors,
        f'loraline_datagen_requests_total{{{ENDPOINT},result="ok"}}': requests,
    }


def _ended(failed: str, succeeded: str) -> dict[str, str]:
    name = f'loraline_job_duration_seconds_count{{{TRAINER},kind="trainer.train",state='
    return {f'{name}"failed"}}': failed, f'{name}"succeeded"}}': succeeded}


def _queue(queued: str, running: str, age: str, running_kind: str = "trainer.train") -> dict[str, str]:
    return {
        f'loraline_jobs{{{TRAINER},kind="trainer.create_tiny_model",state="queued"}}': queued,
        f'loraline_jobs{{{TRAINER},kind="{running_kind}",state="running"}}': running,
        f'loraline_job_queue_age_seconds{{{TRAINER},kind="trainer.create_tiny_model"}}': age,
    }


def _requests(ok: str, wrong: str, outcome: str = "ENGINE_DEAD") -> dict[str, str]:
    name = f'loraline_inference_requests_total{{{INFERENCE},model_kind="adapter",outcome='
    return {f'{name}"ok"}}': ok, f'{name}"{outcome}"}}': wrong}


def _restarts(cause: str, values: str) -> dict[str, str]:
    return {f'loraline_inference_engine_restarts_total{{{INFERENCE},cause="{cause}"}}': values}


def _first_tokens(quick: str, all_: str) -> dict[str, str]:
    return {f'{TTFT}_bucket{{{INFERENCE},le="2.5"}}': quick, f"{TTFT}_count{{{INFERENCE}}}": all_}


def _ready(ready: str, wanted: str) -> dict[str, str]:
    return {
        f'loraline_ready{{{INFERENCE},part="inference"}}': ready,
        f"loraline_inference_model_wanted{{{INFERENCE}}}": wanted,
    }


def _disk(free: str, size: str = "1000x300") -> dict[str, str]:
    return {f"loraline_data_dir_free_bytes{{{TRAINER}}}": free, f"loraline_data_dir_size_bytes{{{TRAINER}}}": size}


def _gpu(used: str) -> dict[str, str]:
    size = "80x60"
    return {
        f'loraline_gpu_memory_used_bytes{{{TRAINER},gpu="0"}}': used,
        f'loraline_gpu_memory_size_bytes{{{TRAINER},gpu="0"}}': size,
    }


def _grpc(good: str, bad: str, code: str = "Unavailable") -> dict[str, str]:
    name = f'grpc_server_handled_total{{{MERGER},grpc_service="s",grpc_method="m",grpc_type="unary",grpc_code='
    return {f'{name}"OK"}}': good, f'{name}"{code}"}}': bad}


def _one(name: str, labels: str, values: str) -> dict[str, str]:
    return {f"{name}{{{labels}}}": values}


FALLS = " ".join(f"{4 - 0.02 * minute:.2f}" for minute in range(121))
RISES = " ".join(f"{2 + max(0, minute - 20) * 0.1:.2f}" for minute in range(61))
BUMP = " ".join("1.0" if minute != 40 else "3.0" for minute in range(61))
FAST, SLOW = "InferenceErrorsBurnFast", "InferenceErrorsBurnSlowly"
SERVERS_FAULTS = (
    "INTERNAL", "ENGINE_DEAD", "ENGINE_REFUSED_ADAPTER", "MODEL_NOT_READY", "MODEL_LOAD_FAILED", "QUEUE_FULL",
    "ADAPTER_PLACES_BUSY", "PROOF_FAILED", "RECEIPT_MISMATCH", "DATABASE_UNREACHABLE", "DATABASE_BUSY",
    "STORE_UNREACHABLE", "STORE_FAILED", "STORE_ACCESS_DENIED", "STORE_BUCKET_MISSING", "DISK_FULL",
    "ARTIFACT_DAMAGED", "MANIFEST_DAMAGED", "WEIGHTS_MALFORMED", "PROBES_MALFORMED", "TOKEN_RECEIPT_MALFORMED",
)  # fmt: skip
"""Outcomes of answers that spend the error budget."""
CALLERS_FAULTS = (
    "PROMPT_TOO_LONG", "KEY_RATE_LIMITED", "MODEL_NOT_SERVED", "NO_MODEL_LOADED", "SESSION_BUSY", "cancelled",
    "STRUCTURED_ANSWER_INVALID", "DIGEST_MISMATCH", "MALFORMED_REQUEST",
)  # fmt: skip
"""Outcomes that spend none."""

FIRES: dict[str, Case | list[Case]] = {
    "TrainingDiverged": Case(_runs("diverged", "0x10 1x20"), 20),
    "TrainingLossRises": Case(_run(RISES, "0+5x60"), 55),
    "TrainingLossNotFinite": [
        Case(_run("2x5" + " NaN" * 10, "0+5x20"), 10),
        Case(_run("2x20", "0+5x20") | _one("loraline_training_eval_loss", RUN, "_x5 2x2" + " NaN" * 10), 12),
        Case(_run("2x20", "0+5x20") | _one("loraline_training_eval_loss", RUN, "_x5 2x2" + " Inf" * 10), 12),
    ],
    "TrainingStalled": [
        Case(_run("2x60", "0+5x10 50x50"), 45),
        Case(_run("_x180", "0x180", "0x180"), 130),  # it never began
        Case(_run("2x180", "0+5x10 50x170", "50x180"), 140),  # it never ended
    ],
    "TrainingLossPlateau": Case(_run("1.5x150", "0+5x150"), 130),
    "TrainingOutOfMemoryLoop": Case(_one("loraline_trainer_oom_recoveries_total", TRAINER, "0x5 1 2 3 4x20"), 20),
    "CheckpointFailures": [
        Case(_one("loraline_trainer_checkpoints_total", f'{TRAINER},result="{result}"', "0x5 1x20"), 20)
        for result in ("unpublished", "torn")
    ],
    "DatagenQuotaExhausted": [
        # The series begins with its first pause: an increase alone would not see it.
        Case(_one("loraline_datagen_pauses_total", f'{ENDPOINT},reason="QUOTA_EXHAUSTED"', "_x40 1x10"), 45),
        # One more pause of a series that has long been there: its beginning alone would not show it.
        Case(_one("loraline_datagen_pauses_total", f'{ENDPOINT},reason="MODEL_COOLDOWN"', "1x35 2x20"), 45),
    ],
    "DatagenRejectionRateHigh": [
        Case(_rows(accepted="0+2x60", rejected_schema="0+6x60"), 45),
        Case(_rows(accepted="3x60", duplicate="0+8x60"), 45),  # a model that says the same again and again
        Case(_rows(unparsable_answer="0+3x60"), 45),
        # What is told of accepted rows besides does not thin the rate.
        Case(_rows(accepted="0+2x60", mended="0+2x60", repaired="0+2x60", timeout="0+3x60"), 45),
    ],
    "DatagenRateLimited": Case(_limits("0+8x60", "0+10x60"), 40),
    "JobPausedTooLong": Case(
        _one("loraline_job_pause_age_seconds", f'{DATAGEN},kind="datagen.generate"', "21000+60x60"), 40
    ),
    "JobQueueTooOld": Case(_one("loraline_job_queue_age_seconds", f'{TRAINER},kind="trainer.train"', "0+60x60"), 45),
    "LeaseTakeovers": Case(
        _one("loraline_job_lease_takeovers_total", f'{MERGER},kind="merger.merge"', "0x10 1x20"), 20
    ),
    "JobsFail": Case(_ended("0x5 1x5 2x5 3x30", "0x60"), 30),
    "JobsWithoutRunner": Case(_queue("1x60", "0x60", "0+60x60"), 20),
    "ArtifactVerificationFailed": Case(_one("loraline_artifact_verification_failures_total", MERGER, "0x10 1x20"), 20),
    "MergeRefused": [
        Case(_one("loraline_merge_refused_total", f'{MERGER},reason="MERGE_CHANGED_MODEL"', "_x10 1x10"), 15),
        Case(_one("loraline_merge_refused_total", f'{MERGER},reason="MERGE_CHANGED_MODEL"', "1x70 2x20"), 80),
    ],
    "AdapterProofFailed": [
        Case(_one("loraline_inference_adapter_loads_total", f'{INFERENCE},result="{result}"', "0x10 1x20"), 20)
        for result in ("PROOF_FAILED", "RECEIPT_MISMATCH")
    ],
    "InferenceNotReady": Case(_ready("1x5 0x30", "1x35"), 20),
    "EngineRestarts": [
        Case(_restarts("died", "0x10 1x5 2 3x20"), 25),
        Case(_restarts("hung", "0x10 1x5 2 3x20"), 25),
        Case(_restarts("died", "0x10 1x20") | _restarts("hung", "0x12 1x20"), 25),  # once the one, once the other
    ],
    FAST: [
        Case(_requests("0+70x120", "0+30x120"), 100, also=(SLOW,)),
        *(Case(_requests("0+70x10", "0+30x10", fault), 10) for fault in SERVERS_FAULTS),
    ],
    SLOW: Case(_requests("0+90x480", "0+10x480"), 400),
    "FirstTokensBurnFast": Case(_first_tokens("0+10x120", "0+100x120"), 100, also=("FirstTokensBurnSlowly",)),
    "FirstTokensBurnSlowly": Case(_first_tokens("0+80x480", "0+100x480"), 400),
    "InferenceQueueGrows": Case(_one("loraline_inference_queued_requests", INFERENCE, "20x40"), 30),
    "InferenceQueueFull": Case(
        _one("loraline_inference_refused_total", f'{INFERENCE},reason="QUEUE_FULL"', "0x10 0+5x20"), 20
    ),
    "KvCacheFull": Case(_one("vllm:kv_cache_usage_perc", f'{INFERENCE},engine="0"', "0.99x40"), 30),
    "ServiceDown": [
        Case(_one("up", TRAINER, "1x5 0x20"), 12),
        *(Case({}, 12, gone=(stage,)) for stage in STAGES),  # a pod that is pending, or gone
        Case({}, 12, gone=STAGES),
    ],
    "DatabaseUnreachable": Case(_one("loraline_ready", f'{TRAINER},part="database"', "1x5 0x20"), 12),
    "GrpcErrors": Case(_grpc("0+50x40", "0+10x40"), 30),
    "DiskAlmostFull": Case(_disk("90x300"), 20),
    "DiskFillsSoon": Case(_disk("390-1x300"), 240),
    "GpuMemoryAlmostFull": Case(_gpu("79x60"), 30),
}

STAYS_QUIET: dict[str, list[Case]] = {
    "TrainingDiverged": [Case(_runs("good", "0+1x30"), 20), Case(_runs("diverged", "3x30"), 20)],
    "TrainingLossRises": [Case(_run(FALLS, "0+5x120"), 100), Case(_run(BUMP, "0+5x60"), 55)],
    "TrainingLossNotFinite": [
        Case(_run(FALLS, "0+5x120"), 50),
        Case(_run(FALLS, "0+5x120") | _one("loraline_training_eval_loss", RUN, "_x5 2x90"), 50),
    ],
    "TrainingStalled": [
        Case(_run(FALLS, "0+5x120"), 60),
        Case(_run("_x90", "0x90", "0x90"), 80),  # a large model that loads for an hour and a half
        Case(_run("2x60", "0+5x10 50x25 50+5x20"), 34),  # an evaluation of 25 minutes
        Case(_run("2x120", "0+5x10 50x110", "50x120"), 100),  # probes and publishing after the last step
        Case(_run("2x10 stale", "0+5x10 stale", "200x10 stale"), 38),  # a run that ended
        Case(_run("2x40 stale", "0+5x10 50x30 stale", "200x40 stale"), 47),  # one that ended after a long evaluation
    ],
    "TrainingLossPlateau": [Case(_run(FALLS, "0+5x120"), 110), Case(_run("1.5x50", "0+5x50"), 50)],
    "TrainingOutOfMemoryLoop": [
        Case(_one("loraline_trainer_oom_recoveries_total", TRAINER, "0x5 1x10 2x20"), 20),
    ],
    "CheckpointFailures": [
        Case(_one("loraline_trainer_checkpoints_total", f'{TRAINER},result="saved"', "0+1x30"), 20),
    ],
    "DatagenQuotaExhausted": [
        Case(_one("loraline_datagen_pauses_total", f'{ENDPOINT},reason="QUOTA_EXHAUSTED"', "1x60"), 50),
        # Bounds that the request set.
        Case(_one("loraline_datagen_pauses_total", f'{UNBOUND},reason="BUDGET_REACHED"', "_x40 1x10"), 45),
        Case(_one("loraline_datagen_pauses_total", f'{UNBOUND},reason="LLM_CANDIDATES_EXHAUSTED"', "0x40 1x10"), 45),
    ],
    "DatagenRejectionRateHigh": [
        Case(_rows(accepted="0+6x60", rejected_schema="0+2x60"), 45),
        Case(_rows(accepted="0x60", rejected_schema="0x10 1 2 3x48"), 45),  # three rows say nothing
        Case(_rows(accepted="0+2x60", mended="0+6x60", repaired="0+6x60"), 45),
        Case(_rows(accepted="0+2x60", surplus="0+6x60"), 45),
    ],
    "DatagenRateLimited": [Case(_limits("0+1x60", "0+10x60"), 40)],
    "JobPausedTooLong": [
        Case(_one("loraline_job_pause_age_seconds", f'{DATAGEN},kind="datagen.generate"', "0+60x60"), 60),
    ],
    "JobQueueTooOld": [
        Case(_one("loraline_job_queue_age_seconds", f'{TRAINER},kind="trainer.train"', "0+60x25 0x30"), 40),
    ],
    "LeaseTakeovers": [Case(_one("loraline_job_lease_takeovers_total", f'{MERGER},kind="merger.merge"', "4x30"), 20)],
    "JobsFail": [Case(_ended("0x5 1x5 2x30", "0x60"), 30), Case(_ended("0x5 1x5 2x5 3x30", "0+1x60"), 30)],
    "JobsWithoutRunner": [Case(_queue("1x60", "1x60", "0+60x30 0x30"), 25)],
    "ArtifactVerificationFailed": [Case(_one("loraline_artifact_verification_failures_total", MERGER, "0x30"), 20)],
    "MergeRefused": [
        Case(_one("loraline_merge_refused_total", f'{MERGER},reason="MERGE_CHANGED_MODEL"', "2x90"), 80),
    ],
    "AdapterProofFailed": [
        Case(_one("loraline_inference_adapter_loads_total", f'{INFERENCE},result="loaded"', "0+1x30"), 20),
    ],
    "InferenceNotReady": [
        Case(_ready("0x40", "0x40"), 30),  # a fresh server of which nobody has asked anything
        Case(_ready("0x8 1x30", "1x40"), 20),  # a model that took eight minutes to load
    ],
    "EngineRestarts": [Case(_restarts("died", "0x10 1x20"), 25), Case(_restarts("hung", "0x10 1x20"), 25)],
    FAST: [
        Case(_requests("0+1000x120", "0+1x120"), 100),
        *(Case(_requests("0+50x30", "0+50x30", fault), 30) for fault in CALLERS_FAULTS),
    ],
    SLOW: [Case(_requests("0+99x480", "0+1x480"), 400)],
    "FirstTokensBurnFast": [Case(_first_tokens("0+99x120", "0+100x120"), 100)],
    "FirstTokensBurnSlowly": [Case(_first_tokens("0+96x480", "0+100x480"), 400)],
    "InferenceQueueGrows": [
        Case(_one("loraline_inference_queued_requests", INFERENCE, "20x5 0 20x5 0 20x5 0 20x5 0 20x10"), 25),
        Case(_one("loraline_inference_queued_requests", INFERENCE, "2x40"), 30),
    ],
    "InferenceQueueFull": [
        Case(_one("loraline_inference_refused_total", f'{INFERENCE},reason="KEY_RATE_LIMITED"', "0x10 0+5x20"), 20),
        Case(_one("loraline_inference_refused_total", f'{INFERENCE},reason="QUEUE_FULL"', "0x10 5x20"), 20),
    ],
    "KvCacheFull": [Case(_one("vllm:kv_cache_usage_perc", f'{INFERENCE},engine="0"', "0.9x40"), 30)],
    "ServiceDown": [
        Case(_one("up", TRAINER, "1x5 0 0 1x20"), 9),
        Case(_one("up", 'instance="x:1",job="other",service="prometheus"', "0x20"), 12),
        # `loraline up`: all stages are one server.
        Case(
            _one("up", 'instance="l:9600",job="loraline",service="loraline"', "1x20"),
            12,
            gone=STAGES,
        ),
    ],
    "DatabaseUnreachable": [Case(_one("loraline_ready", f'{TRAINER},part="database"', "1x5 0 1x20"), 12)],
    "GrpcErrors": [
        Case(_grpc("0+50x40", "0+10x40", "InvalidArgument"), 30),
        Case(_grpc("0+1x40", "0+1x40"), 30),  # two calls a minute say nothing
    ],
    "DiskAlmostFull": [Case(_disk("300x300"), 20)],
    "DiskFillsSoon": [
        Case(_disk("390x300"), 240),
        Case(_disk("900-1x300"), 240),
        Case(_disk("_x200 390-1x60"), 250),  # minutes say nothing of hours
    ],
    "GpuMemoryAlmostFull": [Case(_gpu("72x60"), 30)],  # what vLLM takes by its default
}
