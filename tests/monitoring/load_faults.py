"""The part of the load that meets limits, refusals and defects: their panels and alerts have something to show then."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from load import ADAPTER, generate, recipe_of

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.inference.v1.inference_pb2 import SamplingParameters
from loraline.api.job.v1 import job_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.client import Loraline
from loraline.core.errors import LoralineError
from pipeline_deployments import Deployment

INFERENCE = {"LORALINE_INFERENCE_MAX_CONCURRENT_REQUESTS": "4", "LORALINE_INFERENCE_MAX_QUEUED_REQUESTS": "12"}
"""Settings of the inference stage that let a burst fill the queue."""
BURST = 24
PROFILE = """
name: watch
description: One word for a watch at the tower.
input: {free_text: true, max_text: 200}
answer:
  type: object
  additionalProperties: false
  required: [word]
  properties: {word: {type: string, enum: [calm, storm]}}
sampling: {max_tokens: 40, temperature: 0}
"""
LEFT_OVER = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def write_profiles(folder: Path) -> dict[str, str]:
    """Write a response profile; returns the setting that names its folder."""
    folder.mkdir()
    (folder / "watch.yaml").write_text(PROFILE)
    return {"LORALINE_INFERENCE_PROFILES_DIR": str(folder)}


def meet_limits(client: Loraline) -> None:
    """Rows of a provider with prices that is busy once, and of one whose quota is spent."""
    client.datagen.probe_endpoint("priced", "toy")
    client.jobs.result(generate(client, "priced", recipe_of("toy", 20, "priced")), datagen_pb2.DatasetResult)
    job = client.jobs.wait(generate(client, "spent", recipe_of("toy", 5, "spent")), timeout=120)
    assert (job.state, job.pause.reason) == (job_pb2.JOB_STATE_PAUSED, "QUOTA_EXHAUSTED"), job
    client.jobs.cancel(job.name)


def refuse_and_repair(client: Loraline, folder: Path) -> None:
    """A merge that is refused, a damaged model that is checked and repaired, a merge that mends, and an export."""
    merged = client.artifacts.show("model/mareva")
    (base,) = [ref for ref in merged.inputs if ref.kind == merged.ref.kind]
    (adapter,) = [ref for ref in merged.inputs if ref.kind != merged.ref.kind]
    one = [merger_pb2.WeightedAdapter(ref=adapter)]
    refused = client.merger.merge(merger_pb2.MergeRequest(name="refused", adapters=one, max_abs_logprob_diff=1e-12))
    error = LoralineError.from_status(client.jobs.wait(refused.name, timeout=600).error)
    assert error.reason == "MERGE_CHANGED_MODEL", error

    client.artifacts.download(base, folder / "base")
    _change(folder / "base/config.json", quantization_config=LEFT_OVER)
    left_over = client.artifacts.upload(folder / "base", "left-over", kind="model").artifact.ref
    damaged = merger_pb2.ModelLocation(artifact=left_over)
    sound = merger_pb2.ModelLocation(artifact=base)
    check = client.merger.check(merger_pb2.CheckModelRequest(model=damaged, base_model=sound))
    found = client.jobs.result(check.name, merger_pb2.CheckModelResult)
    assert "QUANTIZATION_LEFT_OVER" in {finding.code for finding in found.findings}
    repair = client.merger.repair(merger_pb2.RepairModelRequest(name="repaired", model=damaged, base_model=sound))
    assert client.jobs.result(repair.name, merger_pb2.RepairModelResult).repaired

    # An adapter from elsewhere does not say what base it was trained on, so this one will do.
    client.artifacts.download(adapter, folder / "adapter")
    (folder / "adapter/base_model.json").unlink()
    foreign = client.artifacts.upload(folder / "adapter", "foreign", kind="adapter").artifact.ref
    of_elsewhere = [merger_pb2.WeightedAdapter(ref=foreign)]
    merge = client.merger.merge(merger_pb2.MergeRequest(name="mended", adapters=of_elsewhere, base_model=left_over))
    mended = client.jobs.result(merge.name, merger_pb2.MergeResult)
    assert "QUANTIZATION_LEFT_OVER" in {finding.code for finding in mended.repairs}
    export = merger_pb2.ExportModelRequest(
        name="mareva", model=mended.model, format=merger_pb2.EXPORT_FORMAT_GGUF_F16
    )  # fmt: skip
    client.jobs.result(client.merger.export(export).name, merger_pb2.ExportModelResult)


def _change(file: Path, **fields: Any) -> None:
    file.chmod(0o600)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def pause_and_resume(client: Loraline, base: str) -> None:
    """Pause a job in its middle by hand, and let it go on."""
    name = generate(client, "paused-once", recipe_of(base, 40))
    client.jobs.pause(name)
    assert client.jobs.wait(name, timeout=300).state == job_pb2.JOB_STATE_PAUSED
    client.jobs.resume(name)
    client.jobs.cancel(name)


def ask_amiss(deployment: Deployment, client: Loraline) -> None:
    """Ask by profile, for a shape that does not fit into the tokens allowed, and more at once than the queue takes."""
    http = openai.OpenAI(base_url=f"{deployment.http}/v1", api_key=deployment.key, max_retries=0)
    for _ in range(3):
        client.inference.answer("", "How is the sea?", profile="watch", sampling=SamplingParameters(max_tokens=40))
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 40}}, "required": ["a"]}
    cut = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for _ in range(2):
        with contextlib.suppress(openai.APIStatusError):
            _ask(http, "Good evening!", 4, response_format=cut, extra_body={"retries": 1})
    with ThreadPoolExecutor(BURST) as pool:
        reasons = [reason for reason in pool.map(lambda n: _burst(http, n), range(BURST)) if reason]
    assert reasons, "the queue was never full"
    # Pages are for more than ten.
    assert len(reasons) <= 10 and all("queue_full" in reason for reason in reasons), reasons


def _burst(http: openai.OpenAI, number: int) -> str:
    try:
        _ask(http, f"Tell me of boat {number}.", 64)
    except openai.APIStatusError as error:
        return str(error.body)
    return ""


def _ask(http: openai.OpenAI, question: str, tokens: int, **more: Any) -> None:
    http.chat.completions.create(
        model=ADAPTER, messages=[{"role": "user", "content": question}], max_tokens=tokens, **more
    )
