"""The whole line for real, by the same test code twice: one process, and four with S3 and Postgres between them.

Raw files of an invented character go in; answers of the tuned model come out through gRPC and through the `openai`
client. The toy base is pretrained for fewer steps than in the demo: here the line is tested, not the quality.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from google.protobuf import json_format, struct_pb2

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.inference.v1.inference_pb2 import SamplingParameters
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.client import Loraline, LoralineApiError, parse_ref
from loraline.core.testing.otlp import Collector, TakenSpan, otlp_collector
from pipeline_deployments import DEPLOYMENTS, Deployment

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParameters(temperature=0, max_tokens=24)
PIPELINE = Path(__file__).parent / "small_persona.yaml"

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Take the traces of servers and commands that are started meanwhile."""
    with otlp_collector() as running, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.grpc)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        yield running


@pytest.fixture(scope="module", params=list(DEPLOYMENTS))
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Deployment]:
    with DEPLOYMENTS[request.param](tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture(scope="module")
def pipeline_file(deployment: Deployment) -> Path:
    folder = deployment.folder / "example"
    shutil.copytree(ROOT / "examples" / "persona" / "raw", folder / "raw")
    return Path(shutil.copy(PIPELINE, folder / "pipeline.yaml"))


def _loraline(deployment: Deployment, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraline.client.cli.main", "--format", "json", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORALINE_")} | deployment.environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def _run_pipeline(deployment: Deployment, file: Path) -> list[dict[str, Any]]:
    done = _loraline(deployment, "run", str(file))
    logs = "".join(f"\n--- {name}\n{deployment.log(name)[-3000:]}" for name in deployment.processes)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}{logs}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def finished(deployment: Deployment, pipeline_file: Path) -> list[dict[str, Any]]:
    """The first run of the pipeline; every test below looks at what it left."""
    return _run_pipeline(deployment, pipeline_file)


@pytest.fixture
def client(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loraline]:
    for name in [name for name in os.environ if name.startswith("LORALINE_")]:
        monkeypatch.delenv(name)
    for name, value in deployment.environment.items():
        monkeypatch.setenv(name, value)
    with Loraline.connect() as connected:
        yield connected


def test_every_stage_left_its_artifact_and_lineage_reaches_the_raw_files(
    finished: list[dict[str, Any]], client: Loraline
) -> None:
    model = client.artifacts.show("model/mareva")
    adapter = client.artifacts.show("adapter/mareva")
    assert any(ref.digest == adapter.digest for ref in model.inputs)
    kinds = set()
    queue, seen = [model], set()
    while queue:
        artifact = queue.pop()
        kinds.add(artifact.ref.kind)
        for ref in artifact.inputs:
            if ref.digest not in seen:
                seen.add(ref.digest)
                queue.append(client.artifacts.show(ref))
    source, dataset, adapters, models = 1, 2, 3, 4
    assert kinds == {source, dataset, adapters, models}


def test_every_file_in_the_store_is_what_its_manifest_says(finished: list[dict[str, Any]], client: Loraline) -> None:
    artifacts = list(client.artifacts.list())
    assert len(artifacts) >= 6
    for artifact in artifacts:
        client.artifacts.verify(artifact.ref)


def test_evidence_is_in_the_results(finished: list[dict[str, Any]], client: Loraline) -> None:
    from loraline.api.merger.v1 import merger_pb2
    from loraline.api.trainer.v1 import trainer_pb2

    trained, merged = trainer_pb2.TrainResult(), merger_pb2.MergeResult()
    jobs = {job.kind: job for job in client.jobs.list()}
    assert jobs["trainer.train"].result.Unpack(trained)
    assert jobs["merger.merge"].result.Unpack(merged)
    assert trained.receipt.fully_masked_rows == 0
    assert 0 < trained.receipt.trained_tokens < trained.receipt.tokens
    assert trained.receipt.rows_teaching_eos > 0
    assert trained.probes.max_abs_logprob_shift > 0.5, "the adapter hardly moves the base"
    assert trained.loss_curve[-1].loss < trained.loss_curve[0].loss
    measured = merged.measurements[0]
    assert measured.within_bound
    assert measured.max_abs_logprob_diff < measured.base_to_adapter_diff / 10
    assert merged.receipt_rows_matched > 0
    served = {model.name: model for model in client.inference.models()}
    proof = next(model.proof for model in served.values() if model.HasField("proof"))
    assert proof.mean_abs_diff_from_trainer <= proof.bound < proof.max_abs_diff_from_base


def test_one_trace_holds_the_line_from_the_file_to_the_answers(
    finished: list[dict[str, Any]], deployment: Deployment, collector: Collector, client: Loraline
) -> None:
    job = next(job.name for job in client.jobs.list() if job.kind == "merger.merge")
    wanted = {"job datagen.convert", "job trainer.train", "job merger.merge", "merger.merge", "artifact publish"}
    wanted |= {f"loraline.api.{call}" for call in (
        "datagen.v1.DatagenService/ConvertDataset", "trainer.v1.TrainerService/Train",
        "merger.v1.MergerService/Merge", "inference.v1.InferenceService/SetAlias",
    )}  # fmt: skip
    spans: list[TakenSpan] = []
    give_up = time.monotonic() + 20
    while not wanted <= {span.name for span in spans} and time.monotonic() < give_up:
        time.sleep(0.2)
        merges = [span.trace for span in collector.spans() if span.facts.get("loraline.job") == job]
        spans = collector.spans(merges[0]) if merges else []
    missing = wanted - {span.name for span in spans}
    assert not missing, f"not in the trace: {missing}"
    (first,) = [span for span in spans if not span.parent]
    assert (first.service, first.name) == ("loraline-cli", "pipeline mareva")
    stages = {f"loraline-{stage}" for stage in ("datagen", "trainer", "merger")}
    # In one process the calls are served by `loraline`; each job's process is its stage's either way.
    stages.add("loraline-inference" if len(deployment.processes) > 1 else "loraline")
    assert stages <= {span.service for span in spans}
    assert not [span.name for span in spans if span.failed]


def test_running_again_repeats_nothing(
    finished: list[dict[str, Any]], deployment: Deployment, pipeline_file: Path, client: Loraline
) -> None:
    before = {job.name: (job.attempt, job.last_sequence) for job in client.jobs.list()}
    artifacts = {(a.ref.kind, a.ref.name, a.ref.version) for a in client.artifacts.list()}
    _run_pipeline(deployment, pipeline_file)
    assert {job.name: (job.attempt, job.last_sequence) for job in client.jobs.list()} == before
    assert {(a.ref.kind, a.ref.name, a.ref.version) for a in client.artifacts.list()} == artifacts


def test_adapter_answers_otherwise_than_base(finished: list[dict[str, Any]], client: Loraline) -> None:
    question = "晚上好！"
    base = client.inference.answer("", question, sampling=GREEDY)
    tuned = client.inference.answer("mareva@production", question, sampling=GREEDY)
    assert base.text != tuned.text


def test_vllm_answers_and_the_contract_says_what_it_takes(finished: list[dict[str, Any]], client: Loraline) -> None:
    capabilities = client.inference.capabilities()
    assert capabilities.engine == "vllm"
    assert capabilities.contract.max_lora_rank >= 8
    assert capabilities.contract.vocab_size > 0


def test_openai_client_streams_from_the_adapter(finished: list[dict[str, Any]], deployment: Deployment) -> None:
    client = openai.OpenAI(base_url=f"{deployment.http}/v1", api_key=deployment.key, max_retries=0)
    assert any(model.id.startswith("mareva") for model in client.models.list())
    messages: list[Any] = [{"role": "user", "content": "Good evening!"}]
    whole = client.chat.completions.create(model="mareva@production", messages=messages, temperature=0, max_tokens=24)
    pieces = client.chat.completions.create(
        model="mareva@production", messages=messages, temperature=0, max_tokens=24, stream=True
    )
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content


def test_datagen_writes_rows_with_the_model_that_vllm_serves(
    finished: list[dict[str, Any]], deployment: Deployment, client: Loraline
) -> None:
    """The toy base writes nonsense; that its rows fit the schema is the work of structured output."""
    models = openai.OpenAI(base_url=f"{deployment.http}/v1", api_key=deployment.key, max_retries=0).models.list()
    base = next(model.id for model in models if (model.model_extra or {})["parent"] is None)
    word = {"type": "string", "pattern": "^[a-z]{3,12}$"}
    schema = {
        "type": "object", "properties": {"prompt": word, "completion": word}, "required": ["prompt", "completion"],
        "additionalProperties": False,
    }  # fmt: skip
    recipe = datagen_pb2.LlmRecipe(
        recipe="instruction-response", rows=4, batch_size=1, endpoints=[datagen_pb2.LlmEndpoint(model=base)],
        system_prompt="Write.", temperature=1, topics=["sea", "salt", "rope", "snow"], max_tokens=160,
        max_candidates_ratio=10, item_schema=json_format.ParseDict(schema, struct_pb2.Struct()),
    )  # fmt: skip
    request = datagen_pb2.GenerateDatasetRequest(name="nonsense", sources=[datagen_pb2.DatasetSource(llm=recipe)])
    result = client.jobs.result(client.datagen.generate(request).name, datagen_pb2.DatasetResult)
    assert (result.train_rows + result.validation_rows, result.rows_by_outcome["accepted"]) == (4, 4)
    assert "rejected_schema" not in result.rows_by_outcome
    folder = deployment.folder / "nonsense"
    client.artifacts.download(result.dataset, folder)
    rows = [json.loads(line) for name in ("train", "validation") for line in (folder / f"{name}.jsonl").open()]
    assert all(re.fullmatch("[a-z]{3,12}", message["content"]) for row in rows for message in row["messages"])
    card = json.loads((folder / "data_card.json").read_text())
    assert card["sources"][0]["models"].keys() == {base}
    assert card["sources"][0]["completion_tokens"] > 0


def test_wrong_keys_are_refused_on_both_doors(
    finished: list[dict[str, Any]], deployment: Deployment, client: Loraline
) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{deployment.http}/v1", api_key="lora_00000000_wrong", max_retries=0).models.list()
    addresses = dict(client.addresses)
    with (
        Loraline.connect(addresses=addresses, key="lora_00000000_wrong") as stranger,
        pytest.raises(LoralineApiError) as refused,
    ):
        list(stranger.jobs.list())
    assert refused.value.reason == "UNKNOWN_KEY"


def test_unknown_artifacts_say_what_there_is(finished: list[dict[str, Any]], client: Loraline) -> None:
    with pytest.raises(LoralineApiError) as missing:
        client.artifacts.show(parse_ref("adapter/nobody"))
    assert missing.value.code.name == "NOT_FOUND"
    assert "mareva" in missing.value.message


def test_merged_model_is_proven_and_answers_like_the_adapter(finished: list[dict[str, Any]], client: Loraline) -> None:
    """Last in this file: it replaces the base that the engine serves."""
    question = "今天过得好吗？"
    tuned = client.inference.answer("mareva@production", question, sampling=GREEDY)
    merged = client.artifacts.show("model/mareva").ref
    served = client.inference.load_model(BaseModel(artifact=merged))
    assert served.proof.mean_abs_diff_from_trainer <= served.proof.bound
    assert client.inference.answer("", question, sampling=GREEDY).text == tuned.text
