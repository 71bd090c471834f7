"""The recipe extraction on the caller's texts: one row each, from wherever they come, and what happens to hard ones."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.errors import LoralineError
from loraline.datagen.llms.request import llm_of
from loraline.datagen.llms.texts import TextPlan, TextStore, named_texts

from .conftest import FakeProvider, Running, completion
from .test_datagen_servicer import reason_of, refused
from .test_llm_jobs import generate, result_of

BOAT = {"type": "object", "properties": {"boat": {"type": "string"}}, "required": ["boat"],
        "additionalProperties": False}  # fmt: skip


def page(number: int) -> str:
    return f"<html><p>The boat <b>Gull-{number}</b> came in.</p></html>"


def asked_text(body: dict[str, Any]) -> str:
    return re.findall(r"Text:\n(.*?)\n\nWrite 1 item", body["messages"][-1]["content"], re.DOTALL)[0]


def read(body: dict[str, Any]) -> web.Response:
    """Read the boat's name, as a model would."""
    name = re.findall(r"Gull-\d+", asked_text(body))[0]
    return completion(json.dumps({"items": [{"record": {"boat": name}}]}))


def recipe(**texts: Any) -> datagen_pb2.LlmRecipe:
    made = datagen_pb2.LlmRecipe(recipe="extraction", texts=datagen_pb2.TextSource(**texts))
    json_format.ParseDict(BOAT, made.item_schema)
    return made


def request_of(made: datagen_pb2.LlmRecipe) -> datagen_pb2.GenerateDatasetRequest:
    request = datagen_pb2.GenerateDatasetRequest(name="boats")
    request.sources.add(name="pages", llm=made)
    return request


def all_rows(running: Running, result: datagen_pb2.DatasetResult) -> list[dict[str, Any]]:
    rows = running.rows(result.dataset)
    return rows + (running.rows(result.dataset, "validation.jsonl") if result.validation_rows else [])


@pytest.mark.slow
async def test_an_artifact_of_pages_and_records_gives_one_row_each(
    running: Running, provider: FakeProvider, tmp_path: Path
) -> None:
    provider.default = read
    folder = tmp_path / "pages"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.html").write_text(page(1))
    (folder / "deep" / "b.md").write_text("# Log\n\nGull-2 left.\n")
    (folder / "README.md").write_text("about this folder, no text to read")
    records = [{"body": "Gull-3 waits."}, {"body": page(1)}, {"body": "  "}, {"body": "Gull-4 sank."}]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    ref = running.upload(folder, "pages")
    job = await generate(running, request_of(recipe(artifact=ref, field="body")))
    result = result_of(job)
    rows = {row["source"]: row for row in all_rows(running, result)}
    assert sorted(rows) == ["a.html", "deep/b.md", "log.jsonl:1", "log.jsonl:4"]
    assert rows["a.html"]["messages"][0]["content"] == page(1)
    assert json.loads(rows["log.jsonl:4"]["messages"][1]["content"]) == {"boat": "Gull-4"}
    assert {(row["format"], row["kind"]) for row in rows.values()} == {("json", "extraction")}
    assert len(provider.requests) == 4
    assert [one.name for one in job.inputs] == ["pages"]
    artifact = running.library.get(result.dataset)
    assert artifact.inputs[0].digest == ref.digest
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    assert card["sources"][0]["in_force"]["texts"]["count"] == 4
    assert card["sources"][0]["in_force"]["texts"]["left_out"] == 2
    sent = provider.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["items"]["items"]
    assert sent["properties"]["record"] == BOAT


@pytest.mark.slow
async def test_a_text_whose_item_is_wrong_is_read_again_and_a_hopeless_one_is_named(
    running: Running, provider: FakeProvider
) -> None:
    tried: list[str] = []

    def reply(body: dict[str, Any]) -> web.Response:
        text = asked_text(body)
        tried.append(text)
        if "Gull-2" in text and tried.count(text) < 2:
            return completion(json.dumps({"items": [{"record": {"ship": "wrong field"}}]}))
        if "nothing" in text:
            return completion("There is no boat here.")
        return read(body)

    provider.default = reply
    texts = [page(1), page(2), "nothing at all", page(3)]
    job = await generate(running, request_of(recipe(texts=texts)))
    assert (job.state, reason_of(job.error)) == (job_pb2.JOB_STATE_FAILED, "TEXTS_UNREADABLE")
    assert "pages: 3 of 4 rows" in job.error.message and "texts[2]" in job.error.message
    assert (tried.count(page(2)), tried.count("nothing at all"), tried.count(page(1))) == (2, 3, 1)
    bodies = [body["messages"][-1]["content"] for body in provider.requests]
    assert len(set(bodies)) == len(bodies), "a repeated reading is another request"
    wanted = recipe(texts=texts)
    wanted.rows = 3
    result = result_of(await generate(running, request_of(wanted)))
    assert result.train_rows + result.validation_rows == 3


@pytest.mark.slow
async def test_a_paused_reading_goes_on_where_it_stopped(running: Running, provider: FakeProvider) -> None:
    error = {"error": {"code": "insufficient_quota", "message": "no credit"}}
    provider.replies = [*[read] * 5, *[lambda _: web.json_response(error, status=429)] * 8]
    provider.default = read
    job = await generate(running, request_of(recipe(texts=[page(n) for n in range(20)])))
    assert job.state == job_pb2.JOB_STATE_PAUSED
    provider.replies, before = [], [asked_text(body) for body in provider.requests]
    await running.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=job.name))
    await asyncio.sleep(0.3)
    result = result_of(await running.finished(job.name))
    rows = all_rows(running, result)
    assert sorted(row["source"] for row in rows) == sorted(f"texts[{n}]" for n in range(20))
    asked_again = [asked_text(body) for body in provider.requests[len(before) :]]
    assert len(asked_again) == len(set(asked_again)) == 15


async def test_a_preview_reads_the_first_texts(running: Running, provider: FakeProvider) -> None:
    provider.default = read
    source = datagen_pb2.DatasetSource(llm=recipe(texts=[page(n) for n in range(9)]))
    response = await running.datagen.PreviewDataset(datagen_pb2.PreviewDatasetRequest(source=source, rows=2))
    assert [row["source"] for row in response.rows] == ["texts[0]", "texts[1]"]
    assert len(provider.requests) == 2


async def test_what_cannot_be_read_is_refused_by_name(running: Running, provider: FakeProvider) -> None:
    model = artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_MODEL, name="x")
    both = recipe(texts=["a"])
    both.texts.path = "/x"
    batch = recipe(texts=["a"])
    batch.batch_size = 2
    other = datagen_pb2.LlmRecipe(recipe="commands", rows=1, texts=datagen_pb2.TextSource(texts=["a"]))
    secret = running.root.parent / "secret.txt"
    secret.write_text("secret")
    for made, reason in (
        (both, "TEXTS_PLACE"), (recipe(), "TEXTS_PLACE"), (batch, "TEXTS_ONE_AT_A_TIME"), (other, "TEXTS_NOT_READ"),
        (recipe(artifact=model), "ARTIFACT_KIND_WRONG"), (recipe(path=str(secret)), "PATH_NOT_ALLOWED"),
    ):  # fmt: skip
        assert (await refused(running.datagen.GenerateDataset(request_of(made))))[1] == reason
    few = recipe(texts=["Gull-1", "Gull-1 ", "Gull-2"])
    few.rows = 3
    job = await generate(running, request_of(few))
    assert reason_of(job.error) == "TEXTS_TOO_FEW" and "2 different" in job.error.message
    (running.root / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    job = await generate(running, request_of(recipe(path=str(running.root))))
    assert reason_of(job.error) == "TEXT_MISSING" and "a.jsonl:2" in job.error.message
    assert provider.requests == []


def test_texts_keep_their_words_names_and_order(tmp_path: Path) -> None:
    texts = ["한국어 텍스트", "b\n\nc", "emoji 👨‍👩‍👧", " b\n\nc "]
    store = TextStore(tmp_path / "t", named_texts(datagen_pb2.TextSource(texts=texts), [], lambda _: tmp_path))
    assert (len(store), store.left_out) == (3, 1)
    assert [(store.name(n), store.text(n)) for n in range(3)] == [(f"texts[{n}]", texts[n]) for n in range(3)]
    store.close()


def test_every_text_is_read_and_a_killed_call_is_made_again(tmp_path: Path) -> None:
    store = TextStore(tmp_path / "t", ((str(n), f"text {n}") for n in range(4)))
    plan = TextPlan(store, 2)
    plan.took(1, accepted=True, final=False)  # replayed: call 0 was under way when the process was killed
    assert [plan.next_call() for _ in range(4)] == [0, 2, 3, None]
    plan.took(0, accepted=False, final=False)
    plan.took(2, accepted=False, final=True)  # the provider refuses its content
    plan.took(3, accepted=True, final=False)
    assert [plan.next_call(), plan.next_call()] == [4, None]
    assert plan.question(4) == ["text 0", "attempt 2"]
    plan.took(4, accepted=False, final=False)
    assert plan.next_call() is None
    assert "2 were read up to 2 times in vain, such as 0, 2" in plan.exhausted("s", 2, 4).message


def test_rows_may_be_left_out_with_texts() -> None:
    assert llm_of(recipe(texts=["a"]), "llm").batch_size == 1
    with pytest.raises(LoralineError) as caught:
        llm_of(datagen_pb2.LlmRecipe(recipe="extraction"), "llm")
    assert caught.value.reason == "ROWS_MISSING"
