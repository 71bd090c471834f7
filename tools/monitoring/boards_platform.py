# ruff: noqa: E501 - a query reads best on one line
"""The dashboards of what stands all the time: Overview, Inference, Platform."""

from __future__ import annotations

from panels import Board, Panel

_TTFT = "loraline_inference_time_to_first_token_seconds_bucket"
_JOBS = "kind:loraline_jobs:max"
_STAGES = 'service=~"datagen|trainer|merger|inference|loraline"'


def _quantiles(series: str, by: str = "") -> dict[str, str]:
    """Return median and 95th percentile of a histogram; `by` is a label that stays."""
    keep, name = (f"{by}, le", f" {{{{{by}}}}}") if by else ("le", "")
    return {
        f"{word}{name}": f"histogram_quantile({quantile}, sum by ({keep}) (rate({series}[5m])))"
        for word, quantile in (("median", 0.5), ("p95", 0.95))
    }


OVERVIEW = Board(
    "loraline-overview",
    "Loraline / Overview",
    "The line from data to answers: what each stage does now, and whether anything is wrong.",
    {
        "Is anything wrong?": [
            Panel(
                "Alerts firing", {"alerts": 'sum(ALERTS{alertstate="firing"}) or vector(0)'},
                kind="stat", width=4, height=4, red_above=1, text="What to do for each: docs/operate.md.",
            ),
            Panel("Parts not ready", {"parts": "count(loraline_ready == 0) or vector(0)"}, kind="stat", width=4, height=4, red_above=1),
            Panel(
                "Answers that fail", {"errors": "inference:errors:ratio_rate5m"}, unit="percentunit", kind="stat",
                width=4, height=4, red_above=0.01, text="Of the last five minutes; only errors that callers cannot mend.",
            ),
            Panel(
                "Oldest queued job", {"age": "max(kind:loraline_job_queue_age_seconds:max)"}, unit="s", kind="stat",
                width=4, height=4, red_above=1800,
            ),
            Panel(
                "Least disk left", {"left": "min(loraline_data_dir_free_bytes / loraline_data_dir_size_bytes)"},
                unit="percentunit", kind="stat", width=4, height=4, red_below=0.1,
            ),
            Panel(
                "Failed jobs in 24 h", {"jobs": 'sum(increase(loraline_job_duration_seconds_count{state="failed"}[24h]))'},
                kind="stat", width=4, height=4, red_above=1,
            ),
        ],
        "From data to answers": [
            Panel(
                "State of each stage", {"{{service}}": f"min by (service) (loraline_ready or up{{{_STAGES}}})"},
                kind="stat", width=24, height=4, red_below=1,
                text="1: it takes work. 0: its server is gone, or a part is not ready; inference without a model is not. The Platform board names the part.",
            ),
            Panel(
                "1 · Datagen: rows accepted",
                {"a minute": 'sum(rate(loraline_datagen_rows_total{outcome="accepted"}[5m])) * 60'}, kind="stat", width=6, height=5,
            ),
            Panel(
                "2 · Trainer: live runs", {"runs": f'{_JOBS}{{kind="trainer.train",state="running"}}'},
                kind="stat", width=6, height=5,
            ),
            Panel(
                "3 · Merger: models in 24 h",
                {"models": 'sum(increase(loraline_job_duration_seconds_count{kind="merger.merge",state="succeeded"}[24h]))'},
                kind="stat", width=6, height=5,
            ),
            Panel(
                "4 · Inference: answers a second", {"answers": "inference:requests:rate5m"}, kind="stat", width=6, height=5,
            ),
        ],
        "The line over time": [
            Panel("Rows a minute by outcome", {"{{outcome}}": "sum by (outcome) (rate(loraline_datagen_rows_total[5m])) * 60"}),
            Panel("Loss of live runs", {"{{run}}": "run:loraline_training_loss:max"}, text="Nats per token."),
            Panel("Jobs running", {"{{kind}}": f'{_JOBS}{{state="running"}} > 0'}, text="By kind."),
            Panel("Answers a second", {"{{model_kind}} {{outcome}}": "sum by (model_kind, outcome) (rate(loraline_inference_requests_total[5m]))"}),
            Panel("First token after", _quantiles(_TTFT), unit="s", text="The goal: 95 % within 2.5 s."),
            Panel("Jobs queued", {"{{kind}}": f'{_JOBS}{{state="queued"}}'}),
        ],
    },
    {},
)  # fmt: skip

INFERENCE = Board(
    "loraline-inference",
    "Loraline / Inference",
    "Answers as callers see them, by adapter, and the engine's own figures.",
    {
        "Now": [
            Panel("Ready", {"{{instance}}": 'loraline_ready{part="inference"}'}, kind="stat", width=4, height=4, red_below=1),
            Panel("Answers a second", {"answers": "inference:requests:rate5m"}, kind="stat", width=4, height=4),
            Panel("Being answered", {"requests": "sum(loraline_inference_in_flight_requests)"}, kind="stat", width=4, height=4),
            Panel("Waiting", {"requests": "sum(loraline_inference_queued_requests)"}, kind="stat", width=4, height=4, red_above=8),
            Panel("Adapters in the engine", {"{{instance}}": "loraline_inference_adapters"}, kind="stat", width=4, height=4),
            Panel("Sessions", {"sessions": "max(loraline_inference_sessions)"}, kind="stat", width=4, height=4),
        ],
        "Answers": [
            Panel(
                "Answers a second by outcome",
                {"{{model_kind}} {{outcome}}": "sum by (model_kind, outcome) (rate(loraline_inference_requests_total[5m]))"}, width=12,
            ),
            Panel("First token after", _quantiles(_TTFT), unit="s", width=12, text="From arrival; the goal is 95 % within 2.5 s."),
            Panel("Tokens a second", {"{{direction}}": "sum by (direction) (rate(loraline_inference_tokens_total[5m]))"}),
            Panel(
                "Error budget spent", {"5 min": "inference:errors:ratio_rate5m", "1 h": "inference:errors:ratio_rate1h"},
                unit="percentunit", red_above=0.01, text="Part of the answers that fail for the server's reasons; the goal is 1 %.",
            ),
            Panel(
                "First tokens later than 2.5 s",
                {"5 min": "inference:slow_first_tokens:ratio_rate5m", "1 h": "inference:slow_first_tokens:ratio_rate1h"},
                unit="percentunit", red_above=0.05,
            ),
            Panel(
                "Refused at the door",
                {
                    "{{reason}}": "sum by (reason) (rate(loraline_inference_refused_total[5m])) * 60",
                    "HTTP {{reason}}": 'sum by (reason) (rate(loraline_http_key_refusals_total{part="inference"}[5m])) * 60',
                },
                text="A minute: QUEUE_FULL, a key at its limit; over HTTP no key, an unknown one, or one without the role.",
            ),
            Panel(
                "Answers of another shape than asked",
                {
                    "{{shape}} {{reason}}": "sum by (shape, reason) (increase(loraline_inference_structured_failures_total[1h]))",
                    "asked again {{reason}}": "sum by (reason) (increase(loraline_inference_structured_retries_total[1h]))",
                },
            ),
            Panel(
                "Answers of profiles",
                {"{{profile}} {{outcome}}": "sum by (profile, outcome) (rate(loraline_inference_profile_answers_total[5m])) * 60"},
            ),
        ],
        "By adapter": [
            Panel(
                "Requests a second",
                {"{{adapter}} {{outcome}}": 'sum by (adapter, outcome) (rate(loraline_inference_adapter_requests_total{adapter=~"$adapter"}[5m]))'},
            ),
            Panel(
                "Time of a request",
                {"{{adapter}}": 'histogram_quantile(0.95, sum by (adapter, le) (rate(loraline_inference_adapter_request_seconds_bucket{adapter=~"$adapter"}[5m])))'},
                unit="s", text="95 % are done within.",
            ),
            Panel(
                "Loads",
                {
                    "{{result}}": "sum by (result) (increase(loraline_inference_adapter_loads_total[1h]))",
                    "swapped out": "sum(increase(loraline_inference_adapter_swaps_total[1h]))",
                },
                text="loaded, or why it was refused; PROOF_FAILED pages. Swapped out again and again: raise MAX_LOADED_ADAPTERS.",
            ),
            Panel(
                "Requests of the last five minutes",
                {"{{adapter}}": 'sum by (adapter) (increase(loraline_inference_adapter_requests_total{adapter=~"$adapter"}[5m]))'},
                kind="table",
            ),
            Panel("Events of sessions", {"{{event}}": "sum by (event) (increase(loraline_inference_session_events_total[1h]))"}),
        ],
        "The engine (vLLM)": [
            Panel(
                "Requests",
                {"running {{model_name}}": "vllm:num_requests_running", "waiting {{model_name}}": "vllm:num_requests_waiting"},
            ),
            Panel("KV cache in use", {"{{model_name}}": "vllm:kv_cache_usage_perc"}, unit="percentunit", red_above=0.95),
            Panel(
                "Tokens a second",
                {"prompt": "sum(rate(vllm:prompt_tokens_total[5m]))", "generated": "sum(rate(vllm:generation_tokens_total[5m]))"},
            ),
            Panel("Between two tokens", _quantiles("vllm:inter_token_latency_seconds_bucket"), unit="s"),
            Panel("Whole answers", _quantiles("vllm:e2e_request_latency_seconds_bucket"), unit="s"),
            Panel("Waiting in the engine", _quantiles("vllm:request_queue_time_seconds_bucket"), unit="s"),
            Panel(
                "Prefix cache hits",
                {"hits": "sum(rate(vllm:prefix_cache_hits_total[5m])) / sum(rate(vllm:prefix_cache_queries_total[5m]))"},
                unit="percentunit",
            ),
            Panel("Thrown out of the batch", {"a minute": "sum(rate(vllm:num_preemptions_total[5m])) * 60"}),
            Panel("Why answers end", {"{{finished_reason}}": "sum by (finished_reason) (rate(vllm:request_success_total[5m]))"}),
            Panel(
                "Engine restarts", {"{{cause}}": "sum by (cause) (increase(loraline_inference_engine_restarts_total[1h]))"}, red_above=1,
            ),
            Panel("Time to load a model", _quantiles("loraline_inference_model_load_seconds_bucket"), unit="s"),
        ],
    },
    {"adapter": "loraline_inference_adapter_requests_total"},
)  # fmt: skip

PLATFORM = Board(
    "loraline-platform",
    "Loraline / Platform",
    "What all services share: readiness, gRPC, jobs and leases, the artifact store, disk, memory.",
    {
        "Readiness": [
            Panel("Ready", {"{{service}} {{part}}": "loraline_ready"}, kind="stat", width=12, height=5, red_below=1),
            Panel("Scraped", {"{{service}} {{instance}}": f"up{{{_STAGES}}}"}, kind="stat", width=12, height=5, red_below=1),
        ],
        "gRPC": [
            Panel("Calls a second", {"{{service}} {{grpc_service}}": "sum by (service, grpc_service) (rate(grpc_server_handled_total[5m]))"}),
            Panel(
                "Errors a second",
                {"{{service}} {{grpc_method}} {{grpc_code}}": 'sum by (service, grpc_method, grpc_code) (rate(grpc_server_handled_total{grpc_code!="OK"}[5m]))'},
                text="All codes but OK, the callers' own errors among them.",
            ),
            Panel(
                "95 % of the calls take up to",
                {"{{grpc_method}}": 'histogram_quantile(0.95, sum by (grpc_method, le) (rate(grpc_server_handling_seconds_bucket{grpc_type="unary"}[5m])))'},
                unit="s",
            ),
            Panel("Calls that no caller can mend", {"{{service}}": "service:grpc_errors:ratio_rate5m"}, unit="percentunit", red_above=0.05),
            Panel(
                "Calls open now",
                {"{{service}}": "sum by (service) (grpc_server_started_total) - sum by (service) (grpc_server_handled_total)"},
                text="Streams that follow jobs and answers, mostly.",
            ),
            Panel(
                "Messages a second",
                {
                    "in {{service}}": "sum by (service) (rate(grpc_server_msg_received_total[5m]))",
                    "out {{service}}": "sum by (service) (rate(grpc_server_msg_sent_total[5m]))",
                },
            ),
        ],
        "Jobs and leases": [
            Panel("Jobs by state", {"{{kind}} {{state}}": f"{_JOBS} > 0"}, width=12),
            Panel("Submitted an hour", {"{{kind}}": "sum by (kind) (increase(loraline_jobs_submitted_total[1h]))"}, width=12),
            Panel(
                "95 % wait up to",
                {"{{kind}}": "histogram_quantile(0.95, sum by (kind, le) (rate(loraline_job_queue_seconds_bucket[1h])))"}, unit="s",
            ),
            Panel("Oldest queued", {"{{kind}}": "kind:loraline_job_queue_age_seconds:max"}, unit="s", red_above=1800),
            Panel("Oldest paused", {"{{kind}}": "kind:loraline_job_pause_age_seconds:max"}, unit="s", red_above=21600),
            Panel("Leases taken over an hour", {"{{kind}}": "sum by (kind) (increase(loraline_job_lease_takeovers_total[1h]))"}, red_above=1),
            Panel(
                "Ended an hour by state",
                {"{{kind}} {{state}}": "sum by (kind, state) (increase(loraline_job_duration_seconds_count[1h]))"}, width=16,
            ),
        ],
        "Artifacts and the store": [
            Panel("Bytes a second", {"{{operation}}": "sum by (operation) (rate(loraline_artifact_bytes_total[5m]))"}, unit="Bps"),
            Panel(
                "95 % of the operations take up to",
                {"{{operation}}": "histogram_quantile(0.95, sum by (operation, le) (rate(loraline_artifact_operation_seconds_bucket[1h])))"},
                unit="s",
            ),
            Panel("Files that were not what they should be", {"{{instance}}": "increase(loraline_artifact_verification_failures_total[24h])"}, red_above=1),
        ],
        "Machines": [
            Panel("Disk left", {"{{instance}}": "loraline_data_dir_free_bytes / loraline_data_dir_size_bytes"}, unit="percentunit", red_below=0.1),
            Panel(
                "GPU memory held", {"{{instance}} GPU {{gpu}}": "loraline_gpu_memory_used_bytes / loraline_gpu_memory_size_bytes"},
                unit="percentunit", red_above=0.98, needs="GPU",
            ),
            Panel("Memory of the servers", {"{{service}}": f"process_resident_memory_bytes{{{_STAGES}}}"}, unit="bytes", text="Without their jobs' processes."),
            Panel("CPU of the servers", {"{{service}}": f"rate(process_cpu_seconds_total{{{_STAGES}}}[5m])"}, text="Cores."),
        ],
    },
    {},
)  # fmt: skip
