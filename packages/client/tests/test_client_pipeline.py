"""Pipelines: what a file may say, ids that follow from it, and runs that never do a thing twice."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import cast

import pytest

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1.datagen_pb2 import GenerateDatasetRequest
from loraline.api.inference.v1 import inference_pb2
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client import AsyncLoraline, JobNotSuccessful
from loraline.client.pipeline.document import SpecError, read_yaml
from loraline.client.pipeline.identity import request_id
from loraline.client.pipeline.plan import plan
from loraline.client.pipeline.reading import read_pipeline
from loraline.client.pipeline.report import marked_share
from loraline.client.pipeline.run import PipelineRun, StageFailed
from loraline.client.pipeline.serving import watched

EXAMPLE = Path(__file__).parents[3] / "examples" / "persona" / "pipeline.yaml"


class Silent:
    """An observer that keeps remarks."""

    def __init__(self):
        self.remarks: list[str] = []

    def started(self, stage, what): ...

    def sent(self, stage, done, total): ...

    def job_update(self, stage, update): ...

    def remark(self, stage, text):
        self.remarks.append(f"{stage}: {text}")

    def finished(self, outcome): ...


def edited(pipeline: Path, old: str, new: str) -> Path:
    text = pipeline.read_text()
    assert old in text
    pipeline.write_text(text.replace(old, new))
    return pipeline


def test_the_example_is_valid():
    spec = read_pipeline(EXAMPLE)
    assert spec.name == "mareva" and set(spec.datasets) == {"dialogue", "settings"}
    assert spec.ask is not None and spec.ask.markers and len(spec.ask.groups["unseen"]) == 6
    assert [stage.name for stage in plan(spec)][-4:] == ["train", "merge", "serve", "ask"]


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("merge: {dtype: fp32}", "merg: {dtype: fp32}", ":13 merg", "Did you mean `merge`?"),
        ("epochs: 3", "epoch: 3", ":12 train.training_params.epoch", "Did you mean `epochs`?"),
        ("epochs: 3", "epochs: three", ":12 train.training_params.epochs", "must be a number"),
        ("epochs: 3", "epochs: 0", ":12 train.training_params.epochs", "0 would mean the default (3)"),
        ("lora_r: 16", "lora_r: 16, r: 8", ":12 train.training_params.r", "is not known here"),
        ("lora_r: 16", "lora_r: 16, lora_rank: 8", ":12 train.training_params.lora_rank", "same as `lora_r`"),
        ("lora_r: 16", "load_in_4bit: true", ":12 train.training_params.load_in_4bit", "quantization: nf4"),
        ("lora_r: 16", "length_policy: cut", ":12 train.training_params.length_policy", "error, truncate, drop, split"),
        ("subpath: settings", "subpath: 7", ":9 datasets.settings.convert.subpath", "Put it in quotes."),
        ("source: raw, subpath: settings", "source: rw", ":9 datasets.settings.convert.source", "no source 'rw'"),
        ("settings: 5", "setings: 5", ":11 train.datasets.setings", "no dataset 'setings'"),
        ("settings: 5", "settings: -5", ":11 train.datasets.settings", "a number above 0"),
        ("{tiny: {tokenizer_texts: raw}}", "{tiny: {}, hub: a/b}", ":3 base_model", "exactly one of"),
        ("{tiny: {tokenizer_texts: raw}}", "{huub: a/b}", ":3 base_model", "exactly one of"),
        ("sources: {raw: raw}", "sources: {raw: nowhere}", ":4 sources.raw", "there is no folder"),
        ("name: mareva", "name: Mareva!", ":2 name", "lower-case"),
        ("merge: {dtype: fp32}", "name: twice", ":13 name", "is given twice"),
        ("alias: production", "model: merged, adapter: true", ":14 serve.adapter", "in the merged model already"),
        ("alias: production", "model: tuned", ":14 serve.model", "`base` or `merged`"),
        ("temperature: 0", "temprature: 0", ":15 ask.temprature", "Did you mean `temperature`?"),
        ("drop_duplicates: true", "drop_duplicates: maybe", ":8 datasets.dialogue.drop_duplicates", "true or false"),
    ],
)
def test_mistakes_are_told_with_line_path_and_remedy(pipeline, old, new, where, what):
    with pytest.raises(SpecError) as caught:
        read_pipeline(edited(pipeline, old, new))
    told = {path.removeprefix(str(pipeline)): text for path, text in caught.value.fields.items()}
    assert where in told, told
    assert what in told[where]


def test_all_mistakes_are_told_at_once(pipeline):
    edited(edited(pipeline, "merge:", "merg:"), "epochs:", "epoch:")
    with pytest.raises(SpecError, match="2 mistakes"):
        read_pipeline(pipeline)


def test_broken_yaml_is_told_with_its_line(pipeline):
    pipeline.write_text("name: x\ndatasets: {a: [}\n")
    with pytest.raises(SpecError) as caught:
        read_pipeline(pipeline)
    assert next(iter(caught.value.fields)).endswith(":2")


def test_the_names_people_have_reach_the_contract(pipeline):
    names = (
        "num_train_epochs: 4, gradient_accumulation_steps: 2, max_seq_length: 256, lora_alpha: 64, lora_dropout: 0.1"
    )
    spec = read_pipeline(edited(pipeline, "epochs: 3", names))
    assert spec.train is not None
    parameters = spec.train.request.parameters
    assert (parameters.epochs, parameters.grad_accum, parameters.max_length) == (4, 2, 256)
    assert parameters.learning_rate == 2e-4  # YAML 1.1 takes `2e-4` for text
    assert (parameters.lora.r, parameters.lora.alpha) == (16, 64)


def test_template_and_llm_datasets_fill_the_contract(pipeline):
    dataset = """  commands:
    template:
      rows: 20
      pools: {item: [lamp, {text: door, weight: 2}]}
      templates: [{prompt: "open {item}", response_json: {do: open, what: "{item}"}}]
      formats: [{format: json, weight: 1}]
  talk: {llm: {recipe: persona-dialogue, rows: 5, request_timeout: 2m, quota_policy: wait, endpoints: [fast]}}
train:
"""
    spec = read_pipeline(edited(pipeline, "train:\n", dataset))
    commands, talk = spec.datasets["commands"].request, spec.datasets["talk"].request
    assert isinstance(commands, GenerateDatasetRequest) and isinstance(talk, GenerateDatasetRequest)
    template = commands.sources[0].template
    assert [(item.text, item.weight) for item in template.pools["item"].items] == [("lamp", 0), ("door", 2)]
    assert template.templates[0].response_json["what"] == "{item}"
    llm = talk.sources[0].llm
    assert llm.request_timeout.seconds == 120 and llm.endpoints[0].name == "fast" and llm.quota_policy == 2


def ref(digest="sha256:" + "a" * 64, version=1):
    return artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_DATASET, name="d", version=version, digest=digest)


def test_request_ids_follow_from_settings_and_input_digests_only():
    def identity(**parameters):
        request = trainer_pb2.TrainRequest(name="m", parameters=trainer_pb2.TrainingParameters(**parameters))
        return lambda *refs: request_id("mareva", "train", request, [("dataset", one) for one in refs])

    first = identity(epochs=3)(ref())
    assert first == identity(epochs=3)(ref(version=7)), "the version of equal content does not count"
    assert first == "mareva.train.d37dbc88ba852a7af619", "ids stay the same across releases"
    assert first != identity(epochs=4)(ref())
    assert first != identity(epochs=3)(ref("sha256:" + "b" * 64))
    assert identity(epochs=3)(ref(), ref("sha256:" + "b" * 64)) == identity(epochs=3)(ref("sha256:" + "b" * 64), ref())


async def run(client, pipeline, observer=None):
    return await PipelineRun(client, read_pipeline(pipeline), observer or Silent()).run()


async def test_a_pipeline_runs_and_a_second_run_does_nothing_again(client, platform, pipeline):
    first = await run(client, pipeline)
    assert all(check.passed for check in first.checks()) and len(first.checks()) == 4
    assert marked_share(first.answers, "tuned", first.markers) == (2, 2)
    assert marked_share(first.answers, "base", first.markers) == (0, 2)
    jobs, calls = len(platform.jobs), list(platform.calls)
    second = await run(client, pipeline)
    assert len(platform.jobs) == jobs == 5
    assert [outcome.how for outcome in second.outcomes[:-1]] == ["already done"] * 7
    assert platform.calls == calls, "nothing is watched, loaded or promoted again"


async def test_training_is_held_to_the_servers_settings_while_no_model_is_served(client, platform, pipeline):
    observer, later = Silent(), Silent()
    assert platform.base is None
    await run(client, pipeline, observer)
    request = trainer_pb2.TrainRequest()
    assert next(job for job in platform.jobs.values() if job.kind == "trainer.train").spec.Unpack(request)
    assert request.serving_contract.max_lora_rank == 64
    assert any("no model is served yet" in remark for remark in observer.remarks)
    assert platform.calls.count("LoadModel") == 1
    await run(client, edited(pipeline, "epochs: 3", "epochs: 4"), later)
    assert not any("no model is served" in remark for remark in later.remarks)


async def test_a_change_does_only_what_depends_on_it_again(client, platform, pipeline):
    await run(client, pipeline)
    edited(pipeline, "epochs: 3", "epochs: 4")
    report = await run(client, pipeline)
    again = {outcome.stage for outcome in report.outcomes if outcome.how != "already done"}
    assert again == {"train", "merge", "serve", "ask"}
    (pipeline.parent / "raw" / "dialogue" / "talk.json").write_text("[1]")
    report = await run(client, pipeline)
    assert [outcome.how for outcome in report.outcomes if outcome.how] == []


async def test_a_failed_job_is_resumed_by_the_next_run(client, platform, pipeline):
    edited(pipeline, "epochs: 3", "epochs: 13")
    with pytest.raises(StageFailed) as caught:
        await run(client, pipeline)
    assert caught.value.stage == "train" and isinstance(caught.value.error, JobNotSuccessful)
    observer = Silent()
    report = await run(client, pipeline, observer)
    train = next(outcome for outcome in report.outcomes if outcome.stage == "train")
    assert train.how == "resumed after FAILED" and platform.jobs[train.job].attempt == 2
    assert any("was FAILED; resuming" in remark for remark in observer.remarks)


async def test_leaving_a_run_keeps_the_job_and_the_next_run_attaches(client, platform, pipeline):
    edited(pipeline, "epochs: 3", "epochs: 99")
    left = PipelineRun(client, read_pipeline(pipeline), Silent())
    task = asyncio.create_task(left.run())
    while "train" not in left.live_jobs:
        await asyncio.sleep(0.02)
    job = left.live_jobs["train"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert platform.jobs[job].state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING)
    observer = Silent()
    second = PipelineRun(client, read_pipeline(pipeline), observer)
    task = asyncio.create_task(second.run())
    while "train" not in second.live_jobs:
        await asyncio.sleep(0.02)
    assert second.live_jobs["train"] == job
    assert any("attached" in remark for remark in observer.remarks)
    task.cancel()


async def test_an_artifact_that_is_gone_is_made_again(client, platform, pipeline):
    await run(client, pipeline)
    platform.artifacts = [a for a in platform.artifacts if a.ref.name != "mareva-settings"]
    report = await run(client, pipeline)
    settings = next(outcome for outcome in report.outcomes if outcome.stage == "dataset:settings")
    assert settings.how == "" and settings.artifact is not None


async def test_the_merged_model_can_be_served_instead(client, platform, pipeline):
    report = await run(client, edited(pipeline, "alias: production", "model: merged"))
    assert platform.base.name == "mareva" and platform.adapters == {}
    assert report.proof is None and {check.name for check in report.checks()} == {
        "token receipt",
        "probes",
        "measured merge",
    }


@pytest.mark.parametrize(
    "text",
    ["a: &a [1]\n" + "b: [" + "*a, " * 40 + "]\n", "[" * 100_000],
    ids=["aliases of aliases", "nested without end"],
)
def test_files_that_would_explode_are_refused(tmp_path, text):
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as refused:
        read_yaml(file)
    assert str(file) in str(refused.value)


async def test_a_long_load_shows_its_phase_and_the_time():
    phases = iter(["Loading model/m: starting.", "Loading model/m: starting.", "Loading model/m: first token."])
    loaded = asyncio.Event()

    class Inference:
        async def capabilities(self):
            phase = next(phases, "")
            if not phase:
                loaded.set()
            return inference_pb2.GetCapabilitiesResponse(not_ready_because=phase)

    class Client:
        inference = Inference()

    async def load() -> str:
        await loaded.wait()
        return "served"

    observer, client = Silent(), cast(AsyncLoraline, Client())
    assert await watched(load(), "loading m", client, observer, 0.05) == "served"
    assert re.fullmatch(r"serve: Loading model/m: starting \(\d+ s\)", observer.remarks[0])
    assert any("first token" in remark for remark in observer.remarks)
    assert observer.remarks[-1].startswith("serve: still loading m (")
    failing = asyncio.get_running_loop().create_future()
    failing.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await watched(failing, "loading m", client, observer, 0.05)
