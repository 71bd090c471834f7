# ruff: noqa: E501 - a query reads best on one line
"""The dashboards of the three stages that run jobs: Datagen, Training, Merge."""

from __future__ import annotations

from panels import Board, Panel


def _stage_jobs(stage: str) -> list[Panel]:
    """Return the panels that every stage with jobs begins with."""
    kinds = f'kind=~"{stage}.*"'
    return [
        Panel("Running now", {"jobs": f'sum(kind:loraline_jobs:max{{{kinds},state="running"}})'}, kind="stat", width=4, height=4),
        Panel("Queued", {"jobs": f'sum(kind:loraline_jobs:max{{{kinds},state="queued"}})'}, kind="stat", width=4, height=4),
        Panel(
            "Paused", {"jobs": f'sum(kind:loraline_jobs:max{{{kinds},state="paused"}})'},
            kind="stat", width=4, height=4, red_above=1, text="Progress is kept; `loraline jobs resume` goes on.",
        ),
        Panel(
            "Failed in 24 h", {"jobs": f'sum(increase(loraline_job_duration_seconds_count{{{kinds},state="failed"}}[24h]))'},
            kind="stat", width=4, height=4, red_above=1,
        ),
        Panel(
            "Oldest queued job", {"age": f"max(kind:loraline_job_queue_age_seconds:max{{{kinds}}})"},
            unit="s", kind="stat", width=4, height=4, red_above=1800,
        ),
        Panel(
            "Half of the jobs take up to",
            {"{{kind}}": f"histogram_quantile(0.5, sum by (kind, le) (rate(loraline_job_duration_seconds_bucket{{{kinds}}}[24h])))"},
            unit="s", kind="stat", width=4, height=4,
        ),
    ]  # fmt: skip


DATAGEN = Board(
    "loraline-datagen",
    "Loraline / Datagen",
    "Rows made and refused, what they cost, and where a limit or a pause stops the work.",
    {
        "Jobs": _stage_jobs("datagen"),
        "Rows": [
            Panel(
                "Rows a minute by outcome",
                {"{{outcome}}": "sum by (outcome) (rate(loraline_datagen_rows_total[5m])) * 60"},
                text="accepted, or why not: rejected_<rule>, duplicate, unparsable_answer, … (docs/metrics.md, outcome).", width=12,
            ),
            Panel(
                "Part of the rows that is refused", {"refused": "datagen:rejected_rows:ratio_rate30m"},
                unit="percentunit", red_above=0.5, width=6, text="Alert DatagenRejectionRateHigh above one half.",
            ),
            Panel(
                "Answers taken over from earlier jobs",
                {"answers": "sum(increase(loraline_datagen_answers_reused_total[1h]))"}, width=6,
                text="They were paid for before and are not asked again.",
            ),
        ],
        "Language models": [
            Panel(
                "Requests a minute by result",
                {"{{endpoint}} {{result}}": "sum by (endpoint, result) (rate(loraline_datagen_requests_total[5m])) * 60"},
            ),
            Panel(
                "Seconds an answer",
                {
                    "{{endpoint}} {{model}}": "sum by (endpoint, model) (rate(loraline_datagen_request_seconds_total[5m])) / "
                    'sum by (endpoint, model) (rate(loraline_datagen_requests_total{result="answered"}[5m]))'
                },
                unit="s",
            ),
            Panel(
                "Tokens a second",
                {"{{direction}} {{model}}": "sum by (direction, model) (rate(loraline_datagen_tokens_total[5m]))"},
            ),
            Panel(
                "Calls at a time, items a call",
                {
                    "calls {{endpoint}}": "max by (endpoint) (loraline_datagen_concurrency)",
                    "items {{endpoint}}": "max by (endpoint) (loraline_datagen_batch_size)",
                },
                text="What the limiter allows while a job asks; it falls after a refusal and grows again.",
            ),
            Panel(
                "Cost", {"{{model}}": "sum by (model) (increase(loraline_datagen_cost_usd_total[24h]))"},
                unit="currencyUSD", text="Of the last 24 hours; only where the endpoint's prices are known.",
            ),
        ],
        "Limits": [
            Panel(
                "Refusals because of a limit",
                {"{{endpoint}} {{reason}}": "sum by (endpoint, reason) (rate(loraline_datagen_quota_errors_total[5m])) * 60"},
                text="A minute, by kind of limit: rate, overloaded, quota, cooldown, spend.",
            ),
            Panel(
                "Pauses", {"{{reason}} {{endpoint}}": "sum by (reason, endpoint) (increase(loraline_datagen_pauses_total[1h]))"},
            ),
            Panel(
                "Time spent waiting for limits", {"waiting": "sum(rate(loraline_datagen_waiting_seconds_total[5m]))"},
                unit="percentunit", text="Seconds waited a second; 1 is one job that only waits.",
            ),
        ],
    },
    {},
)  # fmt: skip

_RUN = '{run=~"$run"}'

TRAINING = Board(
    "loraline-training",
    "Loraline / Training",
    "Every live run: loss, evaluation, accuracy, speed, time left, memory. Series are there while a run is live.",
    {
        "Jobs": _stage_jobs("trainer"),
        "Runs that are live": [
            Panel("Loss", {"{{run}}": f"run:loraline_training_loss:max{_RUN}"}, width=12, height=9, text="Nats per token."),
            Panel(
                "Evaluation loss", {"{{run}}": f"max by (run) (loraline_training_eval_loss{_RUN})"}, width=12, height=9,
                text="Nats per token. Rising while the loss falls: the run learns its rows by heart.",
            ),
            Panel(
                "Token accuracy", {"{{run}}": f"max by (run) (loraline_training_token_accuracy_ratio{_RUN})"},
                unit="percentunit", text="Share of response tokens that the model would have said itself.",
            ),
            Panel("Learning rate", {"{{run}}": f"max by (run) (loraline_training_learning_rate{_RUN})"}, unit="sci"),
            Panel(
                "Gradient norm", {"{{run}}": f"max by (run) (loraline_training_grad_norm{_RUN})"},
                text="Before clipping. Spikes come before a loss that rises.",
            ),
            Panel("Tokens a second", {"{{run}}": f"max by (run) (loraline_training_tokens_per_second{_RUN})"}),
            Panel("Seconds a step", {"{{run}}": f"max by (run) (loraline_training_step_seconds{_RUN})"}, unit="s"),
            Panel("Time left", {"{{run}}": f"max by (run) (loraline_training_eta_seconds{_RUN})"}, unit="s"),
            Panel(
                "Done", {"{{run}}": f"max by (run) (loraline_training_progress_ratio{_RUN})"}, unit="percentunit", red_below=0,
            ),
            Panel(
                "Steps",
                {
                    "{{run}}": f"run:loraline_training_steps:max{_RUN}",
                    "{{run}} planned": f"max by (run) (loraline_training_steps_planned{_RUN})",
                },
            ),
            Panel("Passes over the data", {"{{run}}": f"max by (run) (loraline_training_epochs{_RUN})"}),
            Panel(
                "GPU memory of the run", {"{{run}}": f"max by (run) (loraline_training_gpu_memory_bytes{_RUN})"},
                unit="bytes", needs="GPU", text="The most that the run has held.",
            ),
        ],
        "What runs came to": [
            Panel(
                "Verdicts in 24 h", {"{{verdict}}": "sum by (verdict) (increase(loraline_trainer_runs_total[24h]))"},
                text="What the loss curve says of runs that ended; `loraline runs diagnose` says why.",
            ),
            Panel(
                "Checkpoints an hour by result",
                {"{{result}}": "sum by (result) (increase(loraline_trainer_checkpoints_total[1h]))"},
                text="torn and unpublished ones raise CheckpointFailures.",
            ),
            Panel(
                "Seconds to seal a checkpoint",
                {
                    "seconds": "sum(rate(loraline_trainer_checkpoint_seconds_total[1h])) / "
                    'sum(rate(loraline_trainer_checkpoints_total{result="saved"}[1h]))'
                },
                unit="s",
            ),
            Panel("Bytes of checkpoints an hour", {"bytes": "sum(increase(loraline_trainer_checkpoint_bytes_total[1h]))"}, unit="bytes"),
            Panel(
                "Recoveries from lack of memory an hour",
                {"{{instance}}": "sum by (instance) (increase(loraline_trainer_oom_recoveries_total[1h]))"}, red_above=3,
            ),
            Panel("Optimizer steps a minute, all runs", {"steps": "sum(rate(loraline_trainer_steps_total[5m])) * 60"}),
        ],
    },
    {"run": "loraline_training_loss"},
)  # fmt: skip

MERGE = Board(
    "loraline-merge",
    "Loraline / Merge",
    "What the newest merge measured, how fast models are written, what checks find.",
    {
        "Jobs": _stage_jobs("merger"),
        "The newest merge": [
            Panel(
                "Mean KL divergence", {"KL": "max(loraline_merge_last_mean_kl_nats)"}, kind="stat", width=6, height=5,
                text="In nats, of the merged model from base and adapter; refused above the bound.",
            ),
            Panel(
                "Greatest difference of a log-probability", {"nats": "max(loraline_merge_last_max_abs_logprob_diff_nats)"},
                kind="stat", width=6, height=5,
            ),
            Panel(
                "Time",
                {
                    "whole": "max(loraline_merge_last_seconds)",
                    "writing": "max(loraline_merge_last_write_seconds)",
                    "measuring": "max(loraline_merge_last_measure_seconds)",
                },
                unit="s", kind="stat", width=6, height=5,
            ),
            Panel(
                "Memory and size",
                {
                    "memory while writing": "max(loraline_merge_last_peak_memory_bytes)",
                    "written": "max(loraline_merge_last_written_bytes)",
                },
                unit="bytes", kind="stat", width=6, height=5,
            ),
            Panel("Tensors changed", {"tensors": "max(loraline_merge_last_merged_tensors)"}, kind="stat", width=6, height=5),
            Panel("Bytes a second", {"newest": "max(loraline_merge_last_bytes_per_second)"}, unit="Bps", kind="stat", width=6, height=5),
            Panel("Being written now", {"bytes a second": "max(loraline_merge_bytes_per_second)"}, unit="Bps", width=6, height=5),
            Panel(
                "Repairs in it", {"{{code}}": "max by (code) (loraline_merge_last_repairs)"}, kind="stat", width=6, height=5,
            ),
        ],
        "Over time": [
            Panel("Time of merges by part", {"{{part}}": "sum by (part) (increase(loraline_merge_seconds_total[1h]))"}, unit="s"),
            Panel("Written an hour", {"{{kind}}": "sum by (kind) (increase(loraline_merge_written_bytes_total[1h]))"}, unit="bytes"),
            Panel(
                "Refused, by reason", {"{{reason}}": "sum by (reason) (increase(loraline_merge_refused_total[24h]))"},
                text="Merges and exports that would have changed the model, or could not be made.",
            ),
            Panel(
                "Findings of checks", {"{{severity}} {{code}}": "sum by (code, severity) (increase(loraline_model_findings_total[24h]))"},
            ),
            Panel(
                "Findings of the newest check", {"{{severity}} {{code}}": "max by (code, severity) (loraline_model_check_last_findings)"},
                kind="table",
            ),
            Panel(
                "Repairs", {"{{code}}": "sum by (code) (increase(loraline_model_repairs_total[24h]))"},
            ),
        ],
    },
    {},
)  # fmt: skip
