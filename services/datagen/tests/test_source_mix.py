"""Several sources in one dataset: exactly the rows asked for, counted by outcome, and told in the card."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from aiohttp import web

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2
from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.facts import llm_facts
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import RECIPES

from .conftest import FakeProvider, Running, completion
from .test_datagen_servicer import convert, reason_of
from .test_llm_jobs import counted, generate, result_of

pytestmark = pytest.mark.slow


def template(rows: int, values: int, kind: str = "") -> datagen_pb2.TemplateRecipe:
    recipe = datagen_pb2.TemplateRecipe(rows=rows, kind=kind)
    recipe.pools["n"].items.extend(datagen_pb2.PoolItem(text=str(n)) for n in range(values))
    recipe.templates.add(prompt="question {n}", response="answer {n}")
    return recipe


def mix(**gate: Any) -> datagen_pb2.GenerateDatasetRequest:
    request = datagen_pb2.GenerateDatasetRequest(name="mix", gate=datagen_pb2.QualityGate(**gate))
    request.split.seed = 3
    return request


def say(numbers: Any) -> Any:
    """Return a provider that writes the same rows as the templates do, from the numbers given."""

    def reply(body: dict[str, Any]) -> web.Response:
        wanted = int(body["messages"][-1]["content"].rsplit("Write ", 1)[1].split()[0])
        drawn = list(itertools.islice(numbers, wanted))
        return completion(json.dumps([{"instruction": f"question {n}", "response": f"answer {n}"} for n in drawn]))

    return reply


async def test_rows_that_another_source_has_are_made_again_until_there_are_n(
    running: Running, provider: FakeProvider
) -> None:
    provider.default = say(itertools.count())  # the first 30 are what the templates may have made
    request = mix(drop_duplicates=True)
    request.sources.add(name="first", template=template(20, 30))
    request.sources.add(name="asked", llm=datagen_pb2.LlmRecipe(recipe="instruction-response", rows=25, batch_size=5))
    request.sources.add(name="last", template=template(10, 60))
    result = result_of(await generate(running, request))
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    assert card["rows_by_source"] == {"asked": 25, "first": 20, "last": 10}
    rows = running.rows(result.dataset) + running.rows(result.dataset, "validation.jsonl")
    assert len({row["messages"][0]["content"] for row in rows}) == 55
    by_source = {source["name"]: source["outcomes"] for source in card["sources"]}
    assert by_source["asked"]["accepted"] == 25 and by_source["asked"]["duplicate"] == 20
    assert by_source["last"]["accepted"] == 10 and by_source["last"]["duplicate"] >= 1
    duplicates = by_source["asked"]["duplicate"] + by_source["last"]["duplicate"]
    assert dict(result.rows_by_outcome) == {"accepted": 55, "duplicate": duplicates}
    assert await counted(running, "rows_total", 55, outcome="accepted") == 55
    assert await counted(running, "rows_total", duplicates, outcome="duplicate") == duplicates


async def test_a_template_that_cannot_fill_up_says_which_source_fell_short(running: Running) -> None:
    request = mix(drop_duplicates=True)
    request.sources.add(name="first", template=template(20, 20))
    request.sources.add(name="second", template=template(25, 40))
    job = await generate(running, request)
    assert (job.state, reason_of(job.error)) == (job_pb2.JOB_STATE_FAILED, "TEMPLATE_SPACE_TOO_SMALL")
    assert "second: 25 different rows are wanted" in job.error.message
    assert "give 20 (templates[0] gives 40), and 20 that other sources of the dataset have already" in job.error.message
    request.gate.drop_duplicates = False  # Then a row may stand twice, and the gate only tells it.
    result = result_of(await generate(running, request))
    assert result.rows_by_outcome["accepted"] == 45


async def test_a_model_that_only_repeats_another_source_says_which_source_fell_short(
    running: Running, provider: FakeProvider
) -> None:
    provider.default = say(itertools.cycle(range(6)))
    request = mix(drop_duplicates=True)
    request.sources.add(name="first", template=template(6, 6))
    request.sources.add(name="asked", llm=datagen_pb2.LlmRecipe(recipe="instruction-response", rows=4, batch_size=4))
    job = await generate(running, request)
    assert (job.state, reason_of(job.error)) == (job_pb2.JOB_STATE_FAILED, "LLM_CANDIDATES_EXHAUSTED")
    assert "asked: 0 of 4 rows" in job.error.message and "12 duplicate" in job.error.message


async def test_rows_of_files_are_counted_by_outcome_once(running: Running) -> None:
    records = [{"input": f"q{n % 30}", "output": f"a{n % 30}"} for n in range(40)]
    lines = [json.dumps(record) for record in [*records, {"input": "", "output": "nobody asked"}]]
    (running.root / "a.jsonl").write_text("\n".join([*lines, "{broken", '{"input": "q"}']) + "\n")
    source = datagen_pb2.ConvertSource(path=str(running.root), skip_bad_records=True)
    gate = datagen_pb2.QualityGate(drop_duplicates=True)
    request = datagen_pb2.ConvertDatasetRequest(name="files", source=source, gate=gate)
    result = result_of(await running.finished((await running.datagen.ConvertDataset(request)).job.name))
    told = {"accepted": 30, "duplicate": 10, "bad_record": 2, "no_prompt": 1}
    assert dict(result.rows_by_outcome) == told
    for outcome, count in told.items():
        assert await counted(running, "rows_total", count, outcome=outcome) == count
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    assert card["sources"][0]["outcomes"] == told


async def test_rows_that_the_gate_refuses_are_counted_by_rule_and_no_attempt_counts_twice(running: Running) -> None:
    request = mix(forbid=[datagen_pb2.FORBIDDEN_TEXT_DIGITS])
    request.sources.add(name="numbers", template=template(20, 30))
    job = await generate(running, request)
    assert reason_of(job.error) == "FORBIDDEN_DIGITS"
    assert await counted(running, "rows_total", 20, outcome="rejected_forbidden_digits") == 20
    assert await counted(running, "rows_total", 20, outcome="accepted") == 20
    await running.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=job.name))
    await asyncio.sleep(0.3)
    assert (await running.finished(job.name)).attempt == 2
    await asyncio.sleep(1.5)  # a second attempt's figures would be there by now
    assert await counted(running, "rows_total", 20, outcome="rejected_forbidden_digits") == 20
    assert await counted(running, "rows_total", 20, outcome="accepted") == 20


async def test_the_card_names_what_was_in_force(
    running: Running, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, persona: Any
) -> None:
    provider.key = "sk-not-for-cards-123"
    monkeypatch.setenv("LLM_API_KEY", provider.key)
    host = provider.url.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv("LLM_PRICE_INPUT", "1000")
    refused = [{"instruction": "a", "response": "7"}, {"instruction": "b", "response": "\ufffd"}]
    provider.replies = [completion(json.dumps(refused))]
    words = itertools.count()

    def reply(_: dict[str, Any]) -> web.Response:
        spelled = ["".join(chr(97 + int(digit)) for digit in str(next(words))) for _ in range(5)]
        return completion(json.dumps([{"instruction": f"Say {word}.", "response": word} for word in spelled]))

    provider.default = reply
    request = mix()
    llm = datagen_pb2.LlmRecipe(
        recipe="instruction-response", rows=12, topics=["sea", "bread"], forbid=[datagen_pb2.FORBIDDEN_TEXT_DIGITS]
    )
    request.sources.add(name="asked", llm=llm)
    request.sources.add(name="numbers", template=template(20, 30, "arithmetic"))
    raw = running.upload(persona)
    request.sources.add(name="files", convert=convert(raw))
    result = result_of(await generate(running, request))
    folder = running.library.fetch(result.dataset)
    card = json.loads((folder / "data_card.json").read_text())
    asked, numbers, files = card["sources"]
    force = asked["in_force"]
    assert (force["temperature"], force["batch_size"], force["seed"], force["topics"]) == (0.8, 10, 3, 2)
    assert (force["max_candidates_ratio"], force["quota_policy"], force["forbid"]) == (3.0, "pause", ["digits"])
    assert force["endpoints"] == [{"name": "default", "host": host, "model": "toy"}]
    assert force["prompt_digest"].startswith("sha256:") and "training data" in force["system_prompt"]
    calls = len(provider.requests)
    assert asked["models"] == {"toy": calls}
    assert (asked["prompt_tokens"], asked["completion_tokens"]) == (10 * calls, 20 * calls)
    assert asked["cost_usd"] == pytest.approx(0.01 * calls)
    assert asked["outcomes"]["accepted"] == 12
    assert card["rejected_by_rule"] == {"forbidden_digits": 1, "broken_text": 1}
    assert (numbers["in_force"]["pools"], numbers["in_force"]["formats"]) == ({"n": 30}, {"newline": 1.0})
    assert files["in_force"]["from"] == "source/raw:v1" and files["in_force"]["character"] == "澜音"
    assert card["in_force"]["validation_fraction"] == 0.05 and card["in_force"]["near_duplicate_similarity"] == 0.8
    assert "NOT_JSON" in card["in_force"]["refused_findings"]
    assert card["lineage"] == [{"artifact": "source/raw:v1", "digest": raw.digest}]
    text = (folder / "README.md").read_text()
    for part in (
        "## Source asked (llm)", "| temperature | 0.8 |", "| batch size | 10 |", host,
        f"| answers by model | toy ({calls}) |", "| forbidden_digits | 1 |",
        f"- source/raw:v1 ({raw.digest})", force["prompt_digest"], "| seed | 3 |",
    ):  # fmt: skip
        assert part in text, part
    assert not [path for path in folder.iterdir() if provider.key in path.read_text()]


def test_facts_of_an_endpoint_hold_no_user_password_or_key() -> None:
    endpoint = Endpoint("default", "https://user:password@models.example:8443/v1", "toy", "sk-secret")
    facts = llm_facts(LlmSettings(RECIPES["commands"], 5), [endpoint, endpoint], 7)
    assert facts["endpoints"] == [{"name": "default", "host": "models.example:8443", "model": "toy"}]
    assert not [word for word in ("password", "sk-secret") if word in json.dumps(facts)]
    other = llm_facts(LlmSettings(RECIPES["commands"], 5, brief="Lamps."), [endpoint], 7)
    assert other["prompt_digest"] != facts["prompt_digest"]
