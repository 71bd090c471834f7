"""Fail-over in the middle of a run: keys that reach their quota, endpoints that die, requests that are not accepted."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from loraline.core.errors import LoralineError
from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.llms.endpoint import all_from_environment, from_environment, probe
from loraline.datagen.llms.generate import LlmRun
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.ledger_file import FileLedger
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES
from loraline.datagen.llms.routes import Pace
from loraline.datagen.rows import Row

from .conftest import completion, items

Behaviour = Callable[[int], web.Response | str]
NUMBERS = itertools.count()


def well(_: int) -> web.Response:
    return completion(json.dumps({"items": items(next(NUMBERS) * 10, 3)}))


def after(good: int, then: Behaviour) -> Behaviour:
    """Well for so many requests, then something else."""
    return lambda number: well(number) if number < good else then(number)


def limited(reason: str, seconds: int | None = None, message: str = "at the limit") -> Behaviour:
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return lambda _: web.json_response({"error": {"code": reason, "message": message}}, status=429, headers=headers)


def status(code: int, **error: str) -> Behaviour:
    return lambda _: web.json_response({"error": error}, status=code)


@dataclass
class Models:
    """Two endpoints, `first` and `second`, that behave by the key they are asked with."""

    behave: dict[str, Behaviour] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    lists: dict[str, int] = field(default_factory=dict)
    url: str = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        key = request.headers["authorization"].removeprefix("Bearer ")
        number, self.asked[key] = self.asked[key], self.asked[key] + 1
        reply = self.behave[key](number)
        if isinstance(reply, str):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return reply

    async def models(self, request: web.Request) -> web.StreamResponse:
        self.asked["models"] += 1
        name = request.match_info["name"]
        listed = {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "t"}]}
        return web.json_response(listed, status=self.lists.get(name, 200))


@pytest.fixture
async def models(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Models]:
    made = Models()
    app = web.Application()
    app.router.add_post("/{name}/v1/chat/completions", made.chat)
    app.router.add_get("/{name}/v1/models", made.models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    for name in ("first", "second"):
        monkeypatch.setenv(f"LLM_{name.upper()}_BASE_URL", f"{made.url}/{name}/v1")
        monkeypatch.setenv(f"LLM_{name.upper()}_API_KEY", f"{name}-1")
        monkeypatch.setenv(f"LLM_{name.upper()}_MODEL", "toy")
    yield made
    await runner.cleanup()


@dataclass
class Outcome:
    rows: list[Row]
    intake: Intake
    notes: list[tuple[str, str]]


async def ask(
    folder: Path, rows: int = 30, names: tuple[str, ...] = ("first", "second"), concurrency: int = 3,
    probe_seconds: float = 0.0, **fields: object,
) -> Outcome:  # fmt: skip
    settings = LlmSettings(RECIPES["instruction-response"], rows, **{"batch_size": 3, **fields})  # type: ignore[arg-type]
    made: list[Row] = []
    notes: list[tuple[str, str]] = []
    intake, ledger = Intake(settings, "asked", made.append), FileLedger(folder / "ledger.jsonl")
    endpoints = [endpoint for name in names for endpoint in all_from_environment(name)]
    hooks = Hooks(note=lambda reason, text: notes.append((reason, text)))
    pace = Pace(concurrency, 0.01, stop_grace_seconds=5, probe_seconds=probe_seconds)
    try:
        await LlmRun(settings, endpoints, ledger, intake, 1, hooks, pace).run()
    finally:
        ledger.close()
    return Outcome(made, intake, notes)


async def paused(folder: Path, **fields: object) -> JobPaused:
    with pytest.raises(JobPaused) as caught:
        await ask(folder, **fields)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    "limit", [limited("insufficient_quota"), limited("rate_limit", 600), limited("model_cooldown")]
)
async def test_a_key_at_its_quota_gives_way_to_the_next_one(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: Behaviour
) -> None:
    monkeypatch.setenv("LLM_FIRST_API_KEY", "first-1,first-2")
    models.behave = {"first-1": after(4, limit), "first-2": well, "second-1": well}
    done = await ask(tmp_path)
    assert len({row.messages[0]["content"] for row in done.rows}) == 30
    # Three are under way when the limit is told; a slow machine may try the key again after its back-off of 10 ms.
    assert 4 < models.asked["first-1"] <= 4 + 3 + 3
    assert models.asked["first-2"] == 6
    assert models.asked["second-1"] == 0


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        (lambda _: "abort", "ENDPOINT_UNREACHABLE"),
        (status(502, message="Bad Gateway"), "ENDPOINT_UNREACHABLE"),
        (status(401, message="revoked"), "ENDPOINT_KEY_REFUSED"),
        (status(403, message="not from here"), "ENDPOINT_KEY_REFUSED"),
        (status(404, message="The model `toy` does not exist"), "ENDPOINT_MODEL_NOT_FOUND"),
        (status(400, message="no such parameter"), "ENDPOINT_REFUSED"),
    ],
)
async def test_an_endpoint_that_dies_gives_way_to_the_next_one(
    models: Models, tmp_path: Path, death: Behaviour, reason: str
) -> None:
    models.behave = {"first-1": after(4, death), "second-1": well}
    done = await ask(tmp_path)
    assert len({row.messages[0]["content"] for row in done.rows}) == 30
    assert done.intake.accepted == 30
    assert reason in [name for name, _ in done.notes]
    assert models.asked["second-1"] >= 6


@pytest.mark.parametrize(
    ("first", "second", "reason", "wait"),
    [
        (limited("rate_limit", 900, "slow one"), limited("model_cooldown", 300, "locked two"), "MODEL_COOLDOWN", 300),
        (limited("rate_limit", 300, "slow one"), limited("model_cooldown", 900, "locked two"), "RATE_LIMITED", 300),
        (
            limited("insufficient_quota", None, "slow one"), limited("rate_limit", 300, "locked two"), "RATE_LIMITED",
            300,
        ),
        (status(401, message="slow one"), limited("rate_limit", 300, "locked two"), "RATE_LIMITED", 300),
        (limited("insufficient_quota", None, "slow one"), status(401, message="locked two"), "QUOTA_EXHAUSTED", None),
        (
            limited("insufficient_quota", None, "slow one"), limited("insufficient_quota", None, "locked two"),
            "QUOTA_EXHAUSTED", None,
        ),
    ],
)  # fmt: skip
async def test_both_at_their_end_pause_with_both_reasons_and_the_earliest_time(
    models: Models, tmp_path: Path, first: Behaviour, second: Behaviour, reason: str, wait: int | None
) -> None:
    models.behave = {"first-1": after(3, first), "second-1": after(2, second)}
    pause = await paused(tmp_path)
    assert pause.reason == reason
    for endpoint, words in (("first", "slow one"), ("second", "locked two")):
        assert endpoint in pause.message
        assert words in pause.message or f"{endpoint} refuses the key" in pause.message
    assert "15 of 30 rows are kept" in pause.message
    if wait is None:
        assert pause.retry_time is None
    else:
        assert pause.retry_time is not None
        assert wait - 30 < pause.retry_time.timestamp() - time.time() < wait + 1
    models.behave = {"first-1": well, "second-1": well}
    asked = models.asked.total()
    done = await ask(tmp_path)
    assert len(done.rows) == len({row.messages[0]["content"] for row in done.rows}) == 30
    assert models.asked.total() - asked == 5


async def test_both_lost_pause_with_both_reasons(models: Models, tmp_path: Path) -> None:
    models.behave = {"first-1": after(3, status(401, message="x")), "second-1": after(2, lambda _: "abort")}
    pause = await paused(tmp_path)
    assert "first refuses the key" in pause.message or "first is lost" in pause.message
    assert "second" in pause.message and "does not answer" in pause.message
    assert "15 of 30 rows are kept" in pause.message


async def test_waiting_goes_for_the_endpoint_that_waiting_helps(models: Models, tmp_path: Path) -> None:
    models.behave = {
        "first-1": after(2, limited("insufficient_quota")),
        "second-1": lambda number: limited("rate_limit_exceeded", 1)(0) if number in (2, 3, 4) else well(0),
    }
    done = await ask(tmp_path, quota_policy="wait", concurrency=1)
    assert len(done.rows) == 30


async def test_one_request_that_is_not_accepted_is_set_aside(models: Models, tmp_path: Path) -> None:
    bad = {2, 5, 6, 9}  # two in a row at most
    refuse = status(400, message="This text cannot be processed")
    models.behave = {"first-1": lambda number: refuse(0) if number in bad else well(0)}
    done = await ask(tmp_path, names=("first",), concurrency=1)
    assert len(done.rows) == 30
    assert done.intake.outcomes["refused"] == 3 * len(bad)
    assert [reason for reason, _ in done.notes] == ["REQUEST_SET_ASIDE"]
    assert "This text cannot be processed" in done.notes[0][1]
    again = await ask(tmp_path, names=("first",))
    assert again.intake.outcomes["refused"] == 3 * len(bad)


async def test_requests_that_are_never_accepted_end_the_run_at_once(models: Models, tmp_path: Path) -> None:
    models.behave = {"first-1": status(400, message="max_tokens is too large")}
    with pytest.raises(LoralineError) as caught:
        await ask(tmp_path, names=("first",), concurrency=8)
    assert caught.value.reason == "ENDPOINT_REFUSED"
    assert "max_tokens is too large" in caught.value.message
    assert models.asked["first-1"] <= 4
    models.behave = {"first-1": after(4, status(400, message="a new rule"))}
    models.asked.clear()
    pause = await paused(tmp_path / "later", names=("first",), concurrency=2)
    assert pause.reason == "ENDPOINT_REFUSED"
    assert "12 of 30 rows are kept" in pause.message
    assert models.asked["first-1"] <= 4 + 3 + 2


@pytest.mark.parametrize("code", [404, 405, 501, 500])
async def test_an_endpoint_without_a_list_of_models_is_used(models: Models, tmp_path: Path, code: int) -> None:
    models.lists["first"] = code
    models.behave = {"first-1": well}
    if code == 500:  # That is no missing list.
        with pytest.raises(LoralineError, match="does not answer"):
            await ask(tmp_path, names=("first",), probe_seconds=5.0)
        return
    assert len((await ask(tmp_path, names=("first",), probe_seconds=5.0)).rows) == 30
    listed, _ = await probe(from_environment("first"))
    assert listed == []


async def test_the_probe_can_be_switched_off(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.behave, models.lists["first"] = {"first-1": well}, 500
    monkeypatch.setenv("LLM_FIRST_PROBE", "off")
    assert len((await ask(tmp_path, names=("first",), probe_seconds=5.0)).rows) == 30
    assert models.asked["models"] == 0
    monkeypatch.setenv("LLM_FIRST_PROBE", "perhaps")
    with pytest.raises(LoralineError) as caught:
        from_environment("first")
    assert caught.value.reason == "ENDPOINT_PROBE_INVALID"


async def test_a_probe_says_what_a_chat_said_when_there_is_no_list(models: Models) -> None:
    models.lists["first"] = 404
    models.behave = {"first-1": status(401, message="bad key")}
    with pytest.raises(LoralineError) as caught:
        await asyncio.wait_for(probe(from_environment("first")), 20)
    assert caught.value.reason == "ENDPOINT_KEY_REFUSED"
