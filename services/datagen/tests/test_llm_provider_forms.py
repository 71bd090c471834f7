"""What providers send, byte for byte, through whole runs: how the run ends, why, when it may go on, what is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES
from loraline.datagen.llms.routes import Pace
from loraline.datagen.rows import Row

from .conftest import Running
from .raw_provider import Script, http, playing

DAILY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
GEMINI = (
    b'{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"You exceeded your current quota. Please retry in '
    b'36.429760048s.","details":[{"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"quotaId":"'
    + DAILY.encode()
    + b'","quotaValue":"20"}]},{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"36s"}]}}'
)
COOLDOWN = (
    b'{"error":{"code":"model_cooldown","model":"toy","message":"cooling down","reset_seconds":459202,'
    b'"reset_time":"127h33m21s"}}'
)
RATE = b'{"error":{"code":"rate_limit_exceeded","message":"Rate limit reached"}}'
QUOTA, LOCKED, SLOWER = "QUOTA_EXHAUSTED", "MODEL_COOLDOWN", "RATE_LIMITED"
ROWS, BATCH = 12, 3


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def epoch(seconds: float, factor: int = 1) -> bytes:
    return str(int((time.time() + seconds) * factor)).encode()


def error(code: str, **more: object) -> bytes:
    return json.dumps({"error": {"code": code, "message": "x", **more}}).encode()


def good(first: int, count: int = BATCH) -> bytes:
    items = [{"instruction": f"question {n}", "response": f"answer {n}"} for n in range(first, first + count)]
    return answer(json.dumps({"items": items}))


def answer(text: str, finish_reason: str = "stop") -> bytes:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return http(200, json.dumps({"id": "c", "model": "toy", "choices": [choice], "usage": None}).encode())


@dataclass
class Done:
    """How a run ended."""

    rows: list[Row]
    intake: Intake
    end: BaseException | None


async def run(url: str, folder: Path, rows: int = ROWS, **fields: object) -> Done:
    settings = LlmSettings(RECIPES["instruction-response"], rows, **{"batch_size": BATCH, **fields})  # type: ignore[arg-type]
    made: list[Row] = []
    intake, ledger = Intake(settings, "asked", made.append), FileLedger(folder / "ledger.jsonl")
    pace = Pace(1, 0.01, stop_grace_seconds=5)
    try:
        await LlmRun(settings, [Endpoint("default", url, "toy", "sk-test")], ledger, intake, 1, None, pace).run()
    except (JobPaused, LoralineError) as end:
        return Done(made, intake, end)
    finally:
        ledger.close()
    return Done(made, intake, None)


def limit_forms() -> list[tuple[str, bytes, str, float | None]]:
    """Return name, response, the pause's reason, and the wait that it tells of; times are counted from now."""
    far = in_seconds(900)
    return [
        ("gemini", http(429, GEMINI), QUOTA, 36),
        ("gemini_in_an_array", http(429, b"[" + GEMINI + b"]"), QUOTA, 36),
        ("gemini_array_with_200", http(200, b"[" + GEMINI + b"]"), QUOTA, 36),
        ("gateway_cooldown", http(429, COOLDOWN, "Retry-After: 459202"), LOCKED, 459202),
        ("gateway_cooldown_without_header", http(429, COOLDOWN), LOCKED, 459202),
        ("cooldown_as_go_duration", http(429, error("model_cooldown", reset_time="127h33m21s")), LOCKED, 459201),
        ("quota_reset_delay", http(429, error("x", quotaResetDelay="479417.207ms")), SLOWER, 479.4),
        ("quota_reset_time", http(429, error("x", quotaResetTimeStamp=far.isoformat())), SLOWER, 900),
        ("resets_at", http(429, b'{"error":{"code":"x","resets_at":' + epoch(900) + b"}}"), SLOWER, 900),
        ("resets_in_seconds", http(429, error("x", resets_in_seconds=77)), SLOWER, 77),
        (
            "bare_quota_exhausted",
            http(429, b'{"error":{"status":"RESOURCE_EXHAUSTED","message":"QUOTA_EXHAUSTED"}}'), QUOTA, None,
        ),
        ("insufficient_quota", http(429, error("insufficient_quota")), QUOTA, None),
        ("credit_balance", http(429, error("credit_balance_exhausted")), QUOTA, None),
        ("spend_limit", http(429, error("project_spend_limit_exceeded")), QUOTA, None),
        ("organization_limit", http(429, error("organization_usage_limit_exceeded")), QUOTA, None),
        ("retry_after", http(429, RATE, "Retry-After: 600"), SLOWER, 600),
        ("retry_after_ms", http(429, RATE, "retry-after-ms: 600500", "Retry-After: 7"), SLOWER, 600.5),
        ("retry_after_date", http(429, RATE, f"Retry-After: {format_datetime(far, usegmt=True)}"), SLOWER, 900),
        ("overloaded", http(503, error("server_is_overloaded"), "Retry-After: 60"), SLOWER, 60),
        ("slow_down", http(503, error("slow_down"), "Retry-After: 60"), SLOWER, 60),
        (
            "openai_resets", http(429, RATE, "x-ratelimit-reset-requests: 12ms", "x-ratelimit-reset-tokens: 6m0s"),
            SLOWER, 360,
        ),
        (
            "azure", http(429, error("429", message="Please retry after 86400 seconds."), "Retry-After: 86400",
                          "x-ratelimit-remaining-requests: -1", "x-ratelimit-limit-tokens: 0"), SLOWER, 86400,
        ),
        ("azure_in_words", http(429, error("429", message="Please retry after 86400 seconds.")), SLOWER, 86400),
        (
            "anthropic", http(429, b'{"type":"error","error":{"type":"rate_limit_error","message":"x"}}',
                              "retry-after: 70"), SLOWER, 70,
        ),
        (
            "anthropic_reset", http(429, b'{"type":"error","error":{"type":"rate_limit_error","message":"x"}}',
                                    f"anthropic-ratelimit-tokens-reset: {far.isoformat()}"), SLOWER, 900,
        ),
        (
            "anthropic_overloaded", http(529, b'{"type":"error","error":{"type":"overloaded_error"}}',
                                         "retry-after: 30"), SLOWER, 30,
        ),
        (
            "anthropic_spend", http(400, b'{"type":"error","error":{"type":"invalid_request_error","message":"You have '
                                         b'reached your specified API usage limits."}}'), QUOTA, None,
        ),
        (
            "openrouter_epoch_ms_with_200",
            http(200, b'{"choices":null,"error":{"code":429,"message":"Provider returned error","metadata":{"headers":'
                      b'{"X-RateLimit-Reset":"' + epoch(900, 1000) + b'"}}}}'), SLOWER, 900,
        ),
        ("openrouter_credits", http(402, error("402", message="Insufficient credits")), QUOTA, None),
        ("words", http(429, error("x", message="Rate limit reached. Please try again in 7m12s.")), SLOWER, 432),
        ("no_words_at_all", http(429, b""), SLOWER, None),
        ("html", http(429, b"<html>Too Many Requests</html>"), SLOWER, None),
        ("new_api_saturated", http(429, '{"error":{"message":"上游负载已饱和"}}'.encode()), SLOWER, None),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(limit_forms())), ids=[form[0] for form in limit_forms()])
async def test_a_limit_pauses_with_its_reason_and_time_and_all_rows(number: int, tmp_path: Path) -> None:
    _, response, reason, wait = limit_forms()[number]
    async with playing([good(0)], [good(3)], [response]) as provider:
        done = await run(provider.url, tmp_path)
        assert isinstance(done.end, JobPaused), done.end
        assert done.end.reason == reason
        assert f"6 of {ROWS} rows are kept" in done.end.message
        if wait is None:
            assert done.end.retry_time is None
        else:
            assert done.end.retry_time is not None
            assert wait - 20 < done.end.retry_time.timestamp() - time.time() <= wait + 1
    # The limit is gone, however long the wait that was told: one call finds out, and nothing is asked twice.
    async with playing([good(6)], [good(9)]) as provider:
        again = await run(provider.url, tmp_path)
        assert again.end is None
        assert [row.messages[0]["content"] for row in again.rows] == [f"question {n}" for n in range(ROWS)]
        assert len(provider.requests) == 2


@pytest.mark.parametrize(
    "script",
    [
        [http(429, RATE, "Retry-After: 0.05")],
        [http(429, b'[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"x","details":[{"retryDelay":'
                   b'"0.050000001s"}]}}]')],
        [http(200, b'{"choices":null,"error":{"code":429,"message":"rate_limit"}}', "Retry-After: 0.05")],
        [http(529, b'{"type":"error","error":{"type":"overloaded_error"}}')],
        [http(429, error("model_cooldown", reset_time="2020-01-01T00:00:00Z"))],
    ],
    ids=["retry_after", "gemini_array", "error_in_200", "anthropic_overloaded", "stale_cooldown"],
)  # fmt: skip
async def test_waiting_goes_on_by_itself(script: Script, tmp_path: Path) -> None:
    async with playing([good(0)], script, [good(3)], [good(6)], script, [good(9)]) as provider:
        done = await run(provider.url, tmp_path, quota_policy="wait")
        assert done.end is None
        assert len(done.rows) == ROWS


async def test_a_day_s_quota_that_is_back_after_the_wait_pauses(tmp_path: Path) -> None:
    soon = GEMINI.replace(b'"retryDelay":"36s"', b'"retryDelay":"0.05s"')
    async with playing([good(0)], [http(429, soon)], [http(429, b"[" + soon + b"]")]) as provider:
        done = await run(provider.url, tmp_path, quota_policy="wait")
        assert isinstance(done.end, JobPaused)
        assert (done.end.reason, len(provider.requests)) == (QUOTA, 3)


BODY = good(3)
BROKEN: dict[str, Sequence[bytes | float | str]] = {
    "closed": ["close"],
    "reset": ["reset"],
    "cut_head": [b"HTTP/1.1 200 OK\r\nContent-Le", "close"],
    "cut_body": [BODY[:-9], "close"],
    "half_closed_in_the_body": [BODY[:-9], "half", 0.05, "close"],
    "reset_in_the_body": [BODY[:-9], "reset"],
    "no_http": [b"SSH-2.0-OpenSSH_9.2\r\n"],
    "bad_gateway": [http(502, b"<html>Bad Gateway</html>")],
    "upstream_died_with_200": [http(200, b'{"error":{"message":"upstream died"}}')],
    "no_choices_but_an_error": [http(200, b'{"choices":[],"error":{"message":"upstream died"}}')],
    "page_of_a_gateway": [http(200, b"<html>hello</html>")],
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
async def test_what_may_pass_is_asked_again_and_nothing_of_it_is_taken(script: Script, tmp_path: Path) -> None:
    async with playing([good(0)], script, [good(3)], script, [good(6)], [good(9)]) as provider:
        done = await run(provider.url, tmp_path)
        assert done.end is None
        assert [row.messages[0]["content"] for row in done.rows] == [f"question {n}" for n in range(ROWS)]


async def test_what_stays_broken_pauses_with_the_rows(tmp_path: Path) -> None:
    async with playing([good(0)], ["reset"]) as provider:
        done = await run(provider.url, tmp_path)
        assert isinstance(done.end, JobPaused)
        assert done.end.reason == "ENDPOINT_UNREACHABLE"
        assert f"3 of {ROWS} rows are kept" in done.end.message


@pytest.mark.parametrize(
    "script", [[2.0], [b"HTTP/1.1 200 OK\r\n", 2.0], [BODY[:-5], 2.0]], ids=["silent", "head", "tail"]
)
async def test_slow_answers_halve_the_batch_and_are_made_up_for(script: Script, tmp_path: Path) -> None:
    async with playing([good(0)], script, [good(3, 1)], [good(4)], [good(7)], [good(10)]) as provider:
        done = await run(provider.url, tmp_path, timeout_seconds=0.4)
        assert done.end is None
        assert done.intake.outcomes["timeout"] == 1
        assert len(done.rows) == ROWS
        assert b"Write 1 different item." in provider.requests[2]


ITEM = '{"instruction": "q", "response": "r"}'
TEXTS: dict[str, tuple[bytes, int, str]] = {
    "fenced": (answer(f"Here you go:\n```json\n[{ITEM}]\n```\nBye."), 1, "fenced"),
    "thinking_before": (answer(f"<think>[1] or {{2}}?</think>{ITEM}"), 1, "whole"),
    "in_prose": (answer(f"Sure! {ITEM} That is all."), 1, "objects"),
    "cut_by_length": (answer(f'{{"items": [{ITEM}, {{"instruction": "q2", "resp', "length"), 1, "objects"),
    "prose_with_brackets": (answer("요청하신 [2개]는 만들 수 없습니다."), 0, "none"),
    "nothing": (answer(""), 0, "none"),
    "filtered": (http(400, error("content_filter", message="filtered")), 0, ""),
}


@pytest.mark.parametrize("name", TEXTS)
async def test_texts_of_models_give_their_whole_items_and_no_others(name: str, tmp_path: Path) -> None:
    response, items, rung = TEXTS[name]
    rest = [[good(3 * n, 3)] for n in range(1, 9)]
    async with playing([good(0)], [response], *rest) as provider:
        done = await run(provider.url, tmp_path)
        assert done.end is None
        assert len(done.rows) == ROWS
        assert [row.messages[1]["content"] for row in done.rows].count("r") == items
        if rung:
            assert done.intake.rungs[rung] >= 1
        else:
            assert done.intake.outcomes["filtered"] == BATCH


@pytest.mark.slow
async def test_forms_through_jobs_of_a_service(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provider, service, job: the same bodies end in a PAUSED job, which resuming finishes with exactly N rows."""
    for name in ("gemini_in_an_array", "gateway_cooldown", "openrouter_epoch_ms_with_200"):
        response, reason, wait = next(form[1:] for form in limit_forms() if form[0] == name)
        broken = BROKEN["half_closed_in_the_body"]
        async with playing([good(0)], [good(3)], [response], [good(6)], broken, [good(9)]) as it:
            monkeypatch.setenv("LLM_RAW_BASE_URL", it.url)
            monkeypatch.setenv("LLM_RAW_MODEL", "toy")
            monkeypatch.setenv("LLM_RAW_PROBE", "off")
            monkeypatch.setenv("LORALINE_DATAGEN_LLM_CONCURRENCY", "1")
            monkeypatch.setenv("LORALINE_DATAGEN_LLM_BACKOFF_SECONDS", "0.01")
            request = datagen_pb2.GenerateDatasetRequest(name="asked")
            endpoint = datagen_pb2.LlmEndpoint(name="raw")
            recipe = datagen_pb2.LlmRecipe(
                recipe="instruction-response", rows=ROWS, batch_size=BATCH, endpoints=[endpoint]
            )  # fmt: skip
            request.sources.add(name="asked", llm=recipe)
            begin = time.time()
            job = await running.finished((await running.datagen.GenerateDataset(request)).job.name)
            assert (job.state, job.pause.reason) == (job_pb2.JOB_STATE_PAUSED, reason), name
            assert f"6 of {ROWS} rows are kept" in job.pause.message
            assert job.pause.HasField("retry_time") == (wait is not None)
            if wait is not None:
                assert wait - 5 < job.pause.retry_time.ToSeconds() - begin < wait + 90
            await running.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=job.name))
            done = await running.finished(job.name, 90)
            assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error.message
            result = datagen_pb2.DatasetResult()
            assert done.result.Unpack(result)
            assert result.train_rows + result.validation_rows == ROWS
            assert len(it.requests) == 6
