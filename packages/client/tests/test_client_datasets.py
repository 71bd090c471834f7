"""`loraline datasets check`: what is asked for, what is told, and the exit code."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.client.cli import main as command


async def check_work(platform, job, request):
    await platform.progress(job, 1, 1)
    finding = datagen_pb2.Finding(
        code="NEAR_DUPLICATES", severity=datagen_pb2.FINDING_SEVERITY_WARNING, message="30 rows of 40: alike.",
        why="They teach little.", remedy="Keep one.", row_count=30, rows=[f"train.jsonl:{n}" for n in range(2, 22)],
    )  # fmt: skip
    result = datagen_pb2.CheckResult(findings=[finding], passed=request.gate.language != "ko")
    if request.fix:
        result.fixed.CopyFrom(request.dataset)
        result.fixed.version = 2
    files = {"report.html": b"<!doctype html>", "report.json": str(request.gate).encode()}
    return artifact_pb2.ARTIFACT_KIND_REPORT, request.dataset.name, files, (result, "report")


@pytest.fixture
def address(fake_platform, monkeypatch, start_here):
    """A platform that checks datasets."""

    async def start_check(self, request, context):
        job = await self.p.submit("datagen.check", request, check_work, context)
        return datagen_pb2.CheckDatasetResponse(job=job)

    monkeypatch.setattr(fake_platform.Datagen, "CheckDataset", start_check)
    return start_here()


def call(*arguments):
    return CliRunner().invoke(command.build(), ["datasets", "check", *arguments])


def test_findings_are_told_with_rows_and_the_report_is_saved(address, tmp_path):
    done = call("mareva", "--report", str(tmp_path / "seen"), "--fix", "--address", address)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "warning: NEAR_DUPLICATES: 30 rows of 40: alike." in lines
    shown = ", ".join(f"train.jsonl:{number}" for number in range(2, 7))
    assert f"  rows: {shown} and 25 more" in lines
    assert "  They teach little. Keep one." in lines
    assert "fixed: dataset/mareva:v2" in lines
    assert f"report: {tmp_path / 'seen' / 'report.html'}" in lines
    assert (tmp_path / "seen" / "report.html").read_bytes() == b"<!doctype html>"


def test_every_option_reaches_the_gate_and_a_refused_dataset_fails(address, tmp_path):
    schema = tmp_path / "order.json"
    schema.write_text('{"required": ["goods"]}')
    done = call(
        "mareva", "--language", "ko", "--forbid", "emoji", "--forbid", "latin", "--answers", "json",
        "--max-characters", "100", "--base-model", "tiny", "--max-length", "512", "--allow", "FEW_ROWS",
        "--refuse", "NEAR_DUPLICATES", "--near", "0.7", "--schema", str(schema),
        "--report", str(tmp_path / "seen"), "--address", address,
    )  # fmt: skip
    assert done.exit_code == 1
    assert "The dataset does not pass the gate." in done.output
    gate = (tmp_path / "seen" / "report.json").read_text()
    for part in (
        'language: "ko"', "FORBIDDEN_TEXT_EMOJI", "FORBIDDEN_TEXT_LATIN", "OUTPUT_FORMAT_JSON",
        "max_response_characters: 100", 'name: "tiny"', "max_length: 512", '"FEW_ROWS"',
        'refuse_codes: "NEAR_DUPLICATES"', "near_duplicate_similarity: 0.7", '"goods"',
    ):  # fmt: skip
        assert part in gate
    assert "mareva" not in gate


def test_a_schema_that_cannot_be_read_is_refused_before_anything_is_asked(address, tmp_path):
    for text in ("[1]", "{"):
        (tmp_path / "bad.json").write_text(text)
        done = call("mareva", "--schema", str(tmp_path / "bad.json"), "--address", address)
        assert done.exit_code == 2
        assert "bad.json" in done.output


def test_without_a_folder_the_report_is_named_and_json_has_the_result(address):
    done = call("mareva", "--address", address)
    assert "report: loraline artifacts pull report/mareva:v1 (then open report.html)" in done.output
    done = call("mareva", "--address", address, "--format", "json")
    result = json.loads(done.output.splitlines()[-1])
    assert result["findings"][0]["code"] == "NEAR_DUPLICATES"
    assert result["passed"] is True
