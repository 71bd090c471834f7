"""`loraline datasets recipes|preview|probe` and pipelines with local folders as sources, against the real service."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from typer.testing import CliRunner

from loraline.api.datagen.v1 import datagen_pb2
from loraline.client import AsyncLoraline
from loraline.client.cli import main as command
from loraline.client.pipeline.document import SpecError
from loraline.client.pipeline.plan import plan
from loraline.client.pipeline.reading import read_pipeline
from loraline.client.pipeline.rehearsal import rehearse
from loraline.client.pipeline.run import PipelineRun
from loraline.core.config import CoreSettings
from loraline.core.serving.server import open_platform, serve
from loraline.datagen.component import build


class Model:
    """An OpenAI-compatible endpoint that writes numbered items, or reads boats out of texts."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.made = 0

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "toy", "object": "model"}]})

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        said = body["messages"][-1]["content"]
        boats = re.findall(r"Gull-\d+", said)
        if boats:
            items: list[Any] = [{"record": {"boat": boats[0]}}]
        else:
            count = int(said.rsplit("Write ", 1)[1].split()[0])
            items = [self._command() for _ in range(count)]
        message = {"role": "assistant", "content": json.dumps({"items": items})}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return web.json_response({"id": "c", "object": "chat.completion", "model": "toy", "choices": [choice]})

    def _command(self) -> dict[str, Any]:
        self.made += 1
        return {"text": f"Open door {self.made}!", "command": {"open": self.made}}


@pytest.fixture
async def model(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Model]:
    fake, app = Model(), web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/chat/completions", fake.chat)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setenv("LLM_BASE_URL", f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
    monkeypatch.setenv("LLM_MODEL", "toy")
    yield fake
    await runner.cleanup()


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A real datagen, the artifact and job services beside it."""
    settings = CoreSettings(
        data_dir=tmp_path / "data", listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", auth="off", poll_seconds=0.1
    )
    platform = await asyncio.to_thread(open_platform, settings)
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(settings, [build], platform=platform, ready=ready.set_result, stop=stop))
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    METRICS[ready.result().grpc] = ready.result().metrics
    yield ready.result().grpc
    stop.set()
    await serving
    platform.database.close()


METRICS: dict[str, str] = {}


async def scraped(address: str, line: str) -> bool:
    """Return whether a line comes to stand in the service's /metrics; a job's last figures follow it."""
    async with aiohttp.ClientSession() as session:
        for _ in range(100):
            async with session.get(f"http://{METRICS[address]}/metrics") as response:
                if line in (await response.text()).splitlines():
                    return True
            await asyncio.sleep(0.1)
    return False


async def call(address: str, *arguments: str) -> Any:
    words = ["datasets", *arguments, "--address", address]
    return await asyncio.to_thread(CliRunner().invoke, command.build(), words)


async def test_recipes_say_what_they_make_need_and_take(address: str) -> None:
    done = await call(address, "recipes")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    at = lines.index("evol-instruct")
    assert lines[at + 2] == "  needs: few_shots; takes: brief, topics, personas, styles"
    at = lines.index("extraction")
    assert "takes: texts, item_schema" in lines[at + 2]
    assert lines[at + 3] == "  fields of an item: text, record; the answer is one JSON object"
    told = json.loads((await call(address, "recipes", "--format", "json")).output)
    commands = next(recipe for recipe in told if recipe["name"] == "commands")
    assert commands["item_schema"]["required"] == ["text", "command"] and commands["answer_format"] == "JSON"


async def test_a_preview_shows_rows_and_publishes_nothing(address: str, model: Model) -> None:
    done = await call(address, "preview", "commands", "--brief", "Doors.", "--rows", "2", "--topic", "cellar")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[:3] == ["row 1  commands, json, from llm:call-1.1", "  user: Open door 1!", '  assistant: {"open": 1}']
    assert lines[-1] == "2 rows; nothing was published"
    (asked,) = model.asked
    assert "Doors." in asked["messages"][-1]["content"] and "Topic: cellar" in asked["messages"][-1]["content"]
    told = json.loads((await call(address, "preview", "commands", "--rows", "1", "--format", "json")).output)
    assert [row["kind"] for row in told["rows"]] == ["commands"]
    async with AsyncLoraline.connect(address) as client:
        assert await client.artifacts.list(kind="dataset") == []


async def test_a_preview_reads_files_and_a_source_of_a_file(address: str, model: Model, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("<p>The Gull-7 is in.</p>")
    schema = tmp_path / "boat.json"
    schema.write_text('{"type": "object", "properties": {"boat": {"type": "string"}}, "required": ["boat"]}')
    done = await call(address, "preview", "extraction", "--text", str(page), "--schema", str(schema))
    assert '  assistant: {"boat": "Gull-7"}' in done.output.splitlines(), done.output
    source = tmp_path / "source.yaml"
    source.write_text("template:\n  rows: 9\n  pools: {n: ['1', '2', '3', '4', '5', '6', '7', '8', '9']}\n"
                      "  templates: [{prompt: 'q {n}', response: 'a {n}'}]\n")  # fmt: skip
    told = json.loads((await call(address, "preview", "--file", str(source), "--rows", "3", "--format", "json")).output)
    assert len(told["rows"]) == 3 and told["rows"][0]["kind"] == "template"


async def test_what_a_preview_cannot_do_is_said(address: str, model: Model, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("templates:\n  rows: 9\n")
    for arguments, told in (
        ((), "Name a recipe"), (("commands", "--file", str(wrong)), "Name a recipe"),
        (("--file", str(wrong)), "Did you mean `template`?"), (("nonsense",), "loraline datasets recipes"),
        (("evol-instruct",), "few_shots"), (("evol-instruct", "--example", "no pair"), "QUESTION=>ANSWER"),
        (("commands", "--schema", str(wrong)), "is not JSON"), (("extraction", "--text", "missing"), "cannot be read"),
    ):  # fmt: skip
        done = await call(address, "preview", *arguments)
        assert done.exit_code == 2, done.output
        assert told in done.output, done.output
    assert model.asked == []


async def test_probe_tells_models_or_what_is_wrong(address: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    done = await call(address, "probe")
    assert re.fullmatch(r"the default endpoint answers, in \d+ ms\n  toy\n", done.output), done.output
    told = json.loads((await call(address, "probe", "--format", "json")).output)
    assert told["models"] == ["toy"] and told["latency"] > 0
    done = await call(address, "probe", "--model", "gpt-99")
    assert done.exit_code != 0 and "It lists toy." in done.output
    done = await call(address, "probe", "fast")
    assert done.exit_code != 0 and "LLM_FAST_BASE_URL" in done.output


def test_help_teaches_with_examples() -> None:
    for name in ("recipes", "preview", "probe"):
        done = CliRunner().invoke(command.build(), ["datasets", name, "--help"])
        assert done.exit_code == 0 and f"loraline datasets {name}" in done.output and "Examples:" in done.output


PIPELINE = """
name: boats
base_model: {hub: org/name}
sources: {pages: pages, talk: talk}
datasets:
  mixed:
    drop_duplicates: true
    sources:
      - name: said
        convert: {source: talk, character: Mareva}
      - name: read
        llm: {recipe: extraction, texts: {source: pages, field: body}}
      - name: numbers
        template: {rows: 4, pools: {n: ["1", "2", "3", "4"]}, templates: [{prompt: "q {n}", response: "a {n}"}]}
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.html").write_text("<p>The Gull-1 is in.</p>")
    (tmp_path / "pages" / "log.jsonl").write_text('{"body": "Gull-2 left."}\n')
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk" / "t.jsonl").write_text('{"input": "hello", "output": "Hello, little sailor."}\n')
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE)
    return file


async def test_sources_of_a_dataset_are_uploaded_from_local_folders(address: str, model: Model, pipeline: Path) -> None:
    spec = read_pipeline(pipeline)
    needs = next(stage.needs for stage in plan(spec) if stage.name == "dataset:mixed")
    assert needs == ("source:talk", "source:pages")
    assert await rehearse(spec) > 0
    async with AsyncLoraline.connect(address) as client:
        report = await PipelineRun(client, spec, _Silent()).run()
        outcome = next(one for one in report.outcomes if one.stage == "dataset:mixed")
        assert isinstance(outcome.result, datagen_pb2.DatasetResult)
        assert outcome.result.rows_by_outcome["accepted"] == 1 + 2 + 4
        job = await client.jobs.get(outcome.job)
        assert sorted(ref.name for ref in job.inputs) == ["boats-pages", "boats-talk"]
        # A converted row, two that a model read, four of templates: counted where Prometheus reads.
        assert await scraped(address, 'loraline_datagen_rows_total{outcome="accepted"} 7.0')
        again = await PipelineRun(client, spec, _Silent()).run()
        assert next(one for one in again.outcomes if one.stage == "dataset:mixed").how == "already done"
        (pipeline.parent / "pages" / "a.html").write_text("<p>The Gull-3 is in.</p>")
        changed = await PipelineRun(client, read_pipeline(pipeline), _Silent()).run()
        assert next(one for one in changed.outcomes if one.stage == "dataset:mixed").how == ""


def test_mistakes_in_sources_are_told_at_their_places(pipeline: Path) -> None:
    text = pipeline.read_text().replace("source: talk,", "source: nowhere,").replace("field: body", "artifact: x")
    pipeline.write_text(text.replace("name: numbers\n", "name: numbers\n        convert: {source: talk}\n"))
    with pytest.raises(SpecError) as caught:
        read_pipeline(pipeline)
    told = " ".join(f"{where} {what}" for where, what in caught.value.fields.items())
    for part in ("there is no source 'nowhere'", "cannot stand beside `source`", "exactly one of `convert`"):
        assert part in told


class _Silent:
    def started(self, stage: str, what: str) -> None: ...

    def sent(self, stage: str, done: int, total: int) -> None: ...

    def job_update(self, stage: str, update: Any) -> None: ...

    def remark(self, stage: str, text: str) -> None: ...

    def finished(self, outcome: Any) -> None: ...
