"""The stage through a real server, real jobs in child processes and the real store."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from aiohttp import web
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2

from .conftest import FakeProvider, Running


def reason_of(status: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return info.reason
    return ""


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert isinstance(status, status_pb2.Status)
    return caught.value.code(), reason_of(status), status.message


def convert(ref: artifact_pb2.ArtifactRef, **fields: Any) -> datagen_pb2.ConvertSource:
    return datagen_pb2.ConvertSource(artifact=ref, character="澜音", character_aliases=["Mareva"], **fields)


def result_of(job: job_pb2.Job) -> datagen_pb2.DatasetResult:
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error.message
    result = datagen_pb2.DatasetResult()
    assert job.result.Unpack(result)
    return result


async def test_persona_converts_end_to_end(running: Running, persona: Path) -> None:
    ref = running.upload(persona)
    request = datagen_pb2.ConvertDatasetRequest(
        request_id="one", name="mareva", source=convert(ref, system_prompt="You are {character}."),
        gate=datagen_pb2.QualityGate(drop_duplicates=True), labels={"team": "harbour"},
    )  # fmt: skip
    job = (await running.datagen.ConvertDataset(request)).job
    again = (await running.datagen.ConvertDataset(request)).job
    assert again.name == job.name
    job = await running.finished(job.name)
    result = result_of(job)
    assert (result.rows_by_outcome["accepted"], result.rows_by_outcome["duplicate"]) == (416, 4)
    assert dict(result.rows_by_kind) == {"dialogue": 334, "settings_qa": 52, "background": 30}
    assert (result.train_rows, result.validation_rows) == (395, 21)
    assert list(job.inputs) == [ref]
    assert job.labels["team"] == "harbour"
    train, validation = running.rows(result.dataset), running.rows(result.dataset, "validation.jsonl")
    assert (len(train), len(validation)) == (395, 21)
    assert all(row["messages"][0] == {"role": "system", "content": "You are 澜音."} for row in train)
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    assert card["rows"]["answers"] == 430
    assert card["inputs"] == ["source/raw:v1"]
    assert "澜音" in (running.library.fetch(result.dataset) / "README.md").read_text()
    artifact = running.library.get(result.dataset)
    assert artifact.inputs[0].digest == ref.digest
    assert artifact.facts["rows"] == 416


async def test_a_bad_record_fails_the_job_with_file_and_line_and_publishes_nothing(running: Running) -> None:
    (running.root / "a.jsonl").write_text('{"input": "q", "output": "a"}\n{"input": "q", "output": \n')
    source = datagen_pb2.ConvertSource(path=str(running.root))
    request = datagen_pb2.ConvertDatasetRequest(name="bad", source=source)
    job = await running.finished((await running.datagen.ConvertDataset(request)).job.name)
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert reason_of(job.error) == "JSON_INVALID"
    assert "a.jsonl:2" in job.error.message
    assert running.library.list(kind=artifact_pb2.ARTIFACT_KIND_DATASET)[0] == []
    source.skip_bad_records = True
    request = datagen_pb2.ConvertDatasetRequest(name="bad", source=source)
    result = result_of(await running.finished((await running.datagen.ConvertDataset(request)).job.name))
    assert dict(result.rows_by_outcome) == {"accepted": 1, "bad_record": 1}


async def test_paths_outside_the_allowed_folders_are_refused(running: Running, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"input": "q", "output": "a"}\n')
    (running.root / "link.jsonl").symlink_to(secret)
    paths = (secret, running.root / ".." / "secret.jsonl", running.root / "link.jsonl", running.root, "allowed/a.jsonl")
    for path in paths:
        source = datagen_pb2.ConvertSource(path=str(path))
        call = running.datagen.ConvertDataset(datagen_pb2.ConvertDatasetRequest(name="x", source=source))
        assert (await refused(call))[:2] == (grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED"), path
    source = datagen_pb2.ConvertSource(path=str(running.root / "nothing.jsonl"))
    call = running.datagen.ConvertDataset(datagen_pb2.ConvertDatasetRequest(name="x", source=source))
    assert (await refused(call))[:2] == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")


async def test_a_gate_that_cannot_be_kept_is_refused_by_name(running: Running, persona: Path) -> None:
    ref = running.upload(persona / "settings")
    model = artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_MODEL, name="base")
    no_schema = struct_pb2.Struct(fields={"type": struct_pb2.Value(string_value="thing")})
    for gate, reason, field in (
        (datagen_pb2.QualityGate(max_length=5), "BASE_MODEL_MISSING", "gate.base_model"),
        (datagen_pb2.QualityGate(base_model=ref, max_length=5), "ARTIFACT_KIND_WRONG", "gate.base_model"),
        (datagen_pb2.QualityGate(base_model=model), "ARTIFACT_NOT_FOUND", "model/base"),
        (datagen_pb2.QualityGate(language="fr"), "LANGUAGE_UNKNOWN", "fr"),
        (datagen_pb2.QualityGate(answer_schema=no_schema), "ANSWER_SCHEMA_INVALID", "gate.answer_schema"),
        (datagen_pb2.QualityGate(allow_codes=["ROW_INVALID"]), "FINDING_CANNOT_BE_ALLOWED", "ROW_INVALID"),
        (datagen_pb2.QualityGate(refuse_codes=["TYPO"]), "FINDING_UNKNOWN", "gate.refuse_codes"),
    ):
        request = datagen_pb2.ConvertDatasetRequest(name="x", source=convert(ref), gate=gate)
        _, found, message = await refused(running.datagen.ConvertDataset(request))
        assert found == reason
        assert field in message
    wrong = artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_MODEL, name="raw")
    request = datagen_pb2.ConvertDatasetRequest(name="x", source=convert(wrong))
    assert (await refused(running.datagen.ConvertDataset(request)))[1] == "ARTIFACT_KIND_WRONG"


async def test_an_empty_dataset_is_refused(running: Running) -> None:
    (running.root / "a.jsonl").write_text('{"input": "", "output": "nobody asked"}\n')
    request = datagen_pb2.ConvertDatasetRequest(name="x", source=datagen_pb2.ConvertSource(path=str(running.root)))
    job = await running.finished((await running.datagen.ConvertDataset(request)).job.name)
    assert reason_of(job.error) == "EMPTY_DATASET"
    assert "1 no_prompt" in job.error.message


def template(rows: int) -> datagen_pb2.TemplateRecipe:
    recipe = datagen_pb2.TemplateRecipe(rows=rows)
    recipe.pools["n"].items.extend(datagen_pb2.PoolItem(text=str(n)) for n in range(50))
    recipe.templates.add(prompt="What is {n}?", response="It is {n}.")
    return recipe


@pytest.mark.slow
async def test_a_mix_of_sources_and_the_key_stays_out_of_everything(
    running: Running, provider: FakeProvider, persona: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.key = "sk-very-secret-0123456789"
    monkeypatch.setenv("LLM_API_KEY", provider.key)
    request = datagen_pb2.GenerateDatasetRequest(name="mix", split=datagen_pb2.Split(seed=7, validation_fraction=0.1))
    request.sources.add(name="facts", convert=convert(running.upload(persona), subpath="settings"))
    request.sources.add(name="numbers", template=template(20))
    request.sources.add(name="asked", llm=datagen_pb2.LlmRecipe(recipe="instruction-response", rows=12, batch_size=5))
    job = await running.finished((await running.datagen.GenerateDataset(request)).job.name)
    result = result_of(job)
    assert result.train_rows + result.validation_rows == 82 + 20 + 12
    assert (result.rows_by_kind["template"], result.rows_by_kind["instruction-response"]) == (20, 12)
    assert len(provider.requests) == 3
    kept = [path for path in running.platform.settings.data_dir.rglob("*") if path.is_file()]
    assert not [path for path in kept if provider.key.encode() in path.read_bytes()]


@pytest.mark.slow
async def test_a_quota_pauses_the_job_and_resuming_repeats_no_call(running: Running, provider: FakeProvider) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36s"}]
    error = {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Please retry in 36.4s.", "details": details}
    body = {"error": error}
    provider.replies = [provider.default, provider.default, *[lambda _: web.json_response([body], status=429)] * 4]
    request = datagen_pb2.GenerateDatasetRequest(name="asked")
    request.sources.add(llm=datagen_pb2.LlmRecipe(recipe="instruction-response", rows=30, batch_size=5))
    name = (await running.datagen.GenerateDataset(request)).job.name
    job = await running.finished(name)
    assert (job.state, job.pause.reason) == (job_pb2.JOB_STATE_PAUSED, "QUOTA_EXHAUSTED"), job
    assert "10 of 30 rows are kept" in job.pause.message
    assert 0 < job.pause.retry_time.seconds - job.create_time.seconds < 60
    answered = len(provider.requests)
    provider.replies = []
    await running.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=name))
    await asyncio.sleep(0.2)
    result = result_of(await running.finished(name))
    assert result.train_rows + result.validation_rows == 30
    assert len(provider.requests) - answered == 4
    rows = running.rows(result.dataset) + running.rows(result.dataset, "validation.jsonl")
    assert len({row["messages"][0]["content"] for row in rows}) == 30


async def test_preview_gives_rows_of_every_kind_of_source(
    running: Running, provider: FakeProvider, persona: Path
) -> None:
    ref = running.upload(persona)
    sources = (
        datagen_pb2.DatasetSource(convert=convert(ref, subpath="settings/facts.csv")),
        datagen_pb2.DatasetSource(template=template(20)),
        datagen_pb2.DatasetSource(llm=datagen_pb2.LlmRecipe(recipe="instruction-response", rows=100)),
    )
    for source in sources:
        response = await running.datagen.PreviewDataset(datagen_pb2.PreviewDatasetRequest(source=source, rows=3))
        assert len(response.rows) == 3
        assert all(row["messages"][-1]["role"] == "assistant" for row in response.rows)
    assert len(provider.requests) == 1
    assert running.library.list(kind=artifact_pb2.ARTIFACT_KIND_DATASET)[0] == []


async def test_probe_and_recipes(running: Running, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    response = await running.datagen.ProbeEndpoint(datagen_pb2.ProbeEndpointRequest())
    assert list(response.models) == ["toy"]
    assert response.latency.ToTimedelta().total_seconds() > 0
    wrong = datagen_pb2.ProbeEndpointRequest(endpoint=datagen_pb2.LlmEndpoint(model="gpt-99"))
    assert (await refused(running.datagen.ProbeEndpoint(wrong)))[1] == "ENDPOINT_MODEL_NOT_FOUND"
    unknown = datagen_pb2.ProbeEndpointRequest(endpoint=datagen_pb2.LlmEndpoint(name="other"))
    assert (await refused(running.datagen.ProbeEndpoint(unknown)))[1] == "ENDPOINT_NOT_CONFIGURED"
    monkeypatch.setenv("LLM_API_KEY", "sk-wrong")
    code, reason, message = await refused(running.datagen.ProbeEndpoint(datagen_pb2.ProbeEndpointRequest()))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENDPOINT_KEY_REFUSED")
    assert "sk-wrong" not in message
    first = await running.datagen.ListRecipes(datagen_pb2.ListRecipesRequest(page_size=2))
    rest = await running.datagen.ListRecipes(datagen_pb2.ListRecipesRequest(page_token=first.next_page_token))
    names = [recipe.name for recipe in (*first.recipes, *rest.recipes)]
    assert names == ["commands", "evol-instruct", "extraction", "instruction-response", "persona-dialogue",
                     "recommendation", "self-instruct"]  # fmt: skip
    assert rest.next_page_token == ""
    request = datagen_pb2.GenerateDatasetRequest(name="x")
    request.sources.add(llm=datagen_pb2.LlmRecipe(recipe="evol-instruct", rows=1))
    assert (await refused(running.datagen.GenerateDataset(request)))[1] == "FEW_SHOTS_MISSING"


async def test_check_reports_with_row_numbers_and_fixes_into_a_new_version(running: Running, tmp_path: Path) -> None:
    def row(prompt: str, answer: str) -> str:
        pair = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": pair, "kind": "dialogue"}) + "\n"

    folder = tmp_path / "dataset"
    folder.mkdir()
    train = row("a", "1") + row("b", "2 ") + row("a", "1") + row("c", "") + row("d", "4")
    (folder / "train.jsonl").write_text(train)
    (folder / "validation.jsonl").write_text(row("B", "other") + row("e", "5"))
    ref = running.library.publish(artifact_pb2.ARTIFACT_KIND_DATASET, "messy", folder).ref
    request = datagen_pb2.CheckDatasetRequest(dataset=ref, fix=True)
    job = await running.finished((await running.datagen.CheckDataset(request)).job.name)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error.message
    result = datagen_pb2.CheckResult()
    assert job.result.Unpack(result)
    found = {finding.code: list(finding.rows) for finding in result.findings}
    assert found["EXACT_DUPLICATES"] == ["train.jsonl:3"]
    assert found["EMPTY_CONTENT"] == ["train.jsonl:4"]
    assert found["UNTRIMMED_CONTENT"] == ["train.jsonl:2"]
    assert found["LEAKAGE"] == ["validation.jsonl:1"]
    assert not result.passed
    report = json.loads((running.library.fetch(result.report) / "report.json").read_text())
    assert [finding["code"] for finding in report["findings"]] == [finding.code for finding in result.findings]
    assert (running.library.fetch(result.report) / "report.html").read_text().startswith("<!doctype html>")
    assert result.fixed.version == 2
    assert [row["messages"][1]["content"] for row in running.rows(result.fixed)] == ["1", "2", "4"]
    assert len(running.rows(result.fixed, "validation.jsonl")) == 1
    again = datagen_pb2.CheckDatasetRequest(dataset=result.fixed, fix=True)
    job = await running.finished((await running.datagen.CheckDataset(again)).job.name)
    assert job.result.Unpack(result)
    assert result.passed
    assert not result.HasField("fixed")
    shutil.rmtree(folder)


def word_level(folder: Path) -> Path:
    folder.mkdir()
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "normalizer": None,
                 "post_processor": None, "decoder": None, "truncation": None, "padding": None,
                 "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


async def test_the_gate_refuses_publication_and_leaves_its_report(running: Running, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "좋아요" if n else "word " * 60} for n in range(3)]
    (running.root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = running.library.publish(artifact_pb2.ARTIFACT_KIND_MODEL, "base", word_level(tmp_path / "model")).ref
    source = datagen_pb2.ConvertSource(path=str(running.root))
    gate = datagen_pb2.QualityGate(
        base_model=artifact_pb2.ArtifactRef(kind=model.kind, name="base"), max_length=40, language="ko",
        max_response_characters=100, allow_codes=["UNKNOWN_CHARACTERS"], refuse_codes=["ROW_TRUNCATED"],
    )  # fmt: skip
    request = datagen_pb2.ConvertDatasetRequest(name="gated", source=source, gate=gate)
    request.split.validation_fraction = 0
    job = await running.finished((await running.datagen.ConvertDataset(request)).job.name)
    assert (job.state, reason_of(job.error)) == (job_pb2.JOB_STATE_FAILED, "ROW_TRUNCATED")
    assert "report/gated:v1" in job.error.message
    assert [ref.name for ref in job.inputs] == ["base"]
    assert running.library.list(kind=artifact_pb2.ARTIFACT_KIND_DATASET)[0] == []
    (report,) = running.library.list(kind=artifact_pb2.ARTIFACT_KIND_REPORT)[0]
    told = json.loads((running.library.fetch(report.ref) / "report.json").read_text())
    found = {finding["code"]: finding["examples"][0]["source"] for finding in told["findings"] if finding["examples"]}
    assert {code: found[code] for code in ("ROW_TRUNCATED", "WRONG_LANGUAGE", "ANSWER_TOO_LONG")} == {
        "ROW_TRUNCATED": "a.jsonl:1", "WRONG_LANGUAGE": "a.jsonl:1", "ANSWER_TOO_LONG": "a.jsonl:1",
    }  # fmt: skip
    request.gate.ClearField("refuse_codes")
    request.gate.allow_codes.extend(["WRONG_LANGUAGE", "ANSWER_TOO_LONG"])
    result = result_of(await running.finished((await running.datagen.ConvertDataset(request)).job.name))
    assert {"ROW_TRUNCATED", "WRONG_LANGUAGE"} <= {finding.code for finding in result.findings}
    folder = running.library.fetch(result.dataset)
    assert json.loads((folder / "report.json").read_text())["passed"] is True
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    request.gate.base_model.name = "raw"
    running.library.publish(artifact_pb2.ARTIFACT_KIND_MODEL, "raw", running.root)
    assert (await refused(running.datagen.ConvertDataset(request)))[1] == "TOKENIZER_UNUSABLE"


async def test_sources_of_two_kinds_make_one_dataset(running: Running, persona: Path) -> None:
    request = datagen_pb2.GenerateDatasetRequest(name="mix", split=datagen_pb2.Split(seed=7, validation_fraction=0.1))
    request.sources.add(name="facts", convert=convert(running.upload(persona), subpath="settings"))
    request.sources.add(name="said", convert=convert(running.upload(persona), subpath="dialogue/letters.jsonl"))
    request.sources.add(name="numbers", template=template(20))
    request.sources[2].template.kind = "feedback"
    result = result_of(await running.finished((await running.datagen.GenerateDataset(request)).job.name))
    assert dict(result.rows_by_kind) == {"settings_qa": 52, "background": 30, "dialogue": 63, "feedback": 20}
    card = json.loads((running.library.fetch(result.dataset) / "data_card.json").read_text())
    assert card["rows_by_source"] == {"facts": 82, "said": 63, "numbers": 20}
    assert card["rows_by_format"] == {"text": 145, "newline": 20}
