"""The stage as a server runs it: calls over gRPC, jobs in their own processes, artifacts out."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
import transformers
from prometheus_client import generate_latest

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.api.merger.v1 import merger_pb2, merger_pb2_grpc
from loraline.core.artifacts.refs import format_ref
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.evidence.receipt import load_receipt
from loraline.core.serving.component import Platform
from loraline.core.serving.opening import open_platform
from loraline.core.serving.server import serve
from loraline.core.testing.waiting import until
from loraline.merger.component import build
from loraline.merger.weights.header import read_header

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL, ADAPTER = artifact_pb2.ARTIFACT_KIND_MODEL, artifact_pb2.ARTIFACT_KIND_ADAPTER


@dataclass
class Running:
    platform: Platform
    merger: Any
    jobs: Any

    async def wait(self, name: str, *states: int) -> job_pb2.Job:
        wanted = states or (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
        job = job_pb2.Job()
        for _ in range(6000):
            job = (await self.jobs.GetJob(job_pb2.GetJobRequest(name=name))).job
            if job.state in wanted:
                return job
            await asyncio.sleep(0.1)
        raise AssertionError(f"{name} is {job.state}: {job.progress}")


@asynccontextmanager
async def running(tmp_path: Path, **more: Any) -> AsyncIterator[Running]:
    settings = CoreSettings(
        data_dir=tmp_path / "data", listen="127.0.0.1:0", metrics_listen="", auth="off", lease_seconds=3.0,
        poll_seconds=0.1, allowed_paths=[tmp_path / "allowed"], **more,
    )  # fmt: skip
    (tmp_path / "allowed").mkdir(exist_ok=True)
    platform = open_platform(settings)
    addresses: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(settings, [build], platform=platform, ready=addresses.set_result))
    try:
        await asyncio.wait([server, addresses], return_when=asyncio.FIRST_COMPLETED, timeout=60)
        if server.done():
            server.result()
        async with grpc.aio.insecure_channel((await addresses).grpc) as channel:
            yield Running(platform, merger_pb2_grpc.MergerServiceStub(channel), job_pb2_grpc.JobServiceStub(channel))
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


def publish(platform: Platform, base: Path, adapter: Path) -> tuple[artifact_pb2.ArtifactRef, artifact_pb2.ArtifactRef]:
    """Publish both as trainer and import would."""
    model = platform.library.publish(MODEL, "tiny", base).ref
    record = {"source": "artifact", "ref": format_ref(model), "digest": model.digest}
    record["config_sha256"] = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    (adapter / "base_model.json").write_text(json.dumps(record))
    return model, platform.library.publish(ADAPTER, "voice", adapter).ref


def request(adapter: artifact_pb2.ArtifactRef, **fields: Any) -> merger_pb2.MergeRequest:
    return merger_pb2.MergeRequest(
        name="merged", adapters=[merger_pb2.WeightedAdapter(ref=adapter)], request_id="one", **fields
    )


async def test_merge_check_repair(tmp_path, make_base, make_adapter):
    base = make_base("qwen2", torch.bfloat16, shard="20KB")
    adapter = make_adapter(base)
    async with running(tmp_path) as stage:
        model, _ = publish(stage.platform, base, adapter)
        latest = artifact_pb2.ArtifactRef(kind=ADAPTER, name="voice")
        first = (await stage.merger.Merge(request(latest))).job
        assert [format_ref(ref) for ref in first.inputs] == ["adapter/voice:v1"]
        assert (await stage.merger.Merge(request(latest))).job.name == first.name
        job = await stage.wait(first.name)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        result = merger_pb2.MergeResult()
        assert job.result.Unpack(result)
        assert result.merge_path.startswith("streaming")
        assert result.receipt_rows_matched == 3
        assert result.merged_tensors == 6
        assert all(row.within_bound for row in result.measurements)
        assert not result.repairs
        assert result.synced_files
        artifact = stage.platform.library.get(result.model)
        assert {format_ref(ref) for ref in artifact.inputs} == {"adapter/voice:v1", "model/tiny:v1"}
        assert artifact.inputs[-1].digest == model.digest
        folder = stage.platform.library.fetch(result.model)
        assert {"merge_report.json", "README.md", "token_receipt.json", "probes.json"} <= {
            p.name for p in folder.iterdir()
        }
        assert "adapter/voice:v1" in (folder / "README.md").read_text()
        transformers.AutoModelForCausalLM.from_pretrained(folder)

        location = merger_pb2.ModelLocation(artifact=result.model)
        check = merger_pb2.CheckModelRequest(model=location, base_model=merger_pb2.ModelLocation(artifact=model))
        done = await stage.wait((await stage.merger.CheckModel(check)).job.name)
        found = merger_pb2.CheckModelResult()
        assert done.result.Unpack(found), done.error
        assert found.loadable
        assert [finding.code for finding in found.findings] == ["TOKENIZER_REPLACED"]
        assert stage.platform.library.fetch(found.report).joinpath("report.json").exists()
        found_here = 'loraline_model_findings_total{code="TOKENIZER_REPLACED",severity="info"} 1.0'
        # A job's last figures reach the service's metrics a moment after its state does.
        await until(lambda: found_here in generate_latest(stage.platform.registry).decode(), found_here)
        metrics = generate_latest(stage.platform.registry).decode()
        for name in ("mean_kl_nats", "peak_memory_bytes", "bytes_per_second", "measure_seconds"):
            assert f"loraline_merge_last_{name} " in metrics
        assert 'loraline_merge_written_bytes_total{kind="merge"}' in metrics
        assert 'loraline_merge_seconds_total{part="measure"}' in metrics
        assert not any("/jobs/" in str(path) for path in (tmp_path / "data").glob("jobs/*/model"))


async def counted(stage: Running, line: str) -> None:
    """Wait until the service's metrics have a line; a job's last figures reach them a moment after its state does."""
    await until(lambda: line in generate_latest(stage.platform.registry).decode(), line)


async def test_check_and_repair_by_path(tmp_path, make_base, make_adapter):
    """Also a folder whose token receipt is of another tokenizer: nothing else shows that its chats are garbage."""
    base = make_base("llama")
    receipt = load_receipt(make_adapter(base))
    row = receipt.rows[1]
    receipt.rows[1] = type(row)(row.source, row.messages, [*row.input_ids[:6], 77, *row.input_ids[7:]], row.labels_mask)
    receipt.save(base)
    async with running(tmp_path) as stage:
        target = tmp_path / "allowed" / "broken"
        base.rename(target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
        location = merger_pb2.ModelLocation(path=str(target))
        check = await stage.merger.CheckModel(merger_pb2.CheckModelRequest(model=location))
        found = merger_pb2.CheckModelResult()
        assert (await stage.wait(check.job.name)).result.Unpack(found)
        assert [finding.code for finding in found.findings] == ["VOCAB_SIZE_MISMATCH", "RECEIPT_MISMATCH"]
        assert "train.jsonl:2" in found.findings[1].message
        assert not found.loadable
        await counted(stage, 'loraline_model_check_last_findings{code="RECEIPT_MISMATCH",severity="error"} 1.0')
        repair = await stage.merger.RepairModel(merger_pb2.RepairModelRequest(name="mended", model=location))
        mended = merger_pb2.RepairModelResult()
        done = await stage.wait(repair.job.name)
        assert done.result.Unpack(mended), done.error
        assert [finding.code for finding in mended.repaired] == ["VOCAB_SIZE_MISMATCH"]
        assert [finding.code for finding in mended.remaining] == ["RECEIPT_MISMATCH"]
        await counted(stage, 'loraline_model_repairs_total{code="VOCAB_SIZE_MISMATCH"} 1.0')
        folder = stage.platform.library.fetch(mended.model)
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 320
        assert json.loads((target / "config.json").read_text())["vocab_size"] == 999
        outside = merger_pb2.CheckModelRequest(model=merger_pb2.ModelLocation(path=str(tmp_path / "data")))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stage.merger.CheckModel(outside)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_refusals_publish_nothing(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16)
    adapter = make_adapter(base)
    other = make_base("llama", torch.bfloat16, name="other", seed=9)
    async with running(tmp_path) as stage:
        _, voice = publish(stage.platform, base, adapter)
        foreign = stage.platform.library.publish(MODEL, "other", other).ref
        job = await stage.wait((await stage.merger.Merge(request(voice, base_model=foreign))).job.name)
        error = LoralineError.from_status(job.error)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_OF_ANOTHER_BASE")
        await counted(stage, 'loraline_merge_refused_total{reason="ADAPTER_OF_ANOTHER_BASE"} 1.0')
        strict = request(voice, max_abs_logprob_diff=1e-6)
        strict.request_id = "two"
        job = await stage.wait((await stage.merger.Merge(strict)).job.name)
        error = LoralineError.from_status(job.error)
        assert error.reason == "MERGE_CHANGED_MODEL"
        assert float(error.metadata["max_abs_logprob_diff"]) > 1e-6
        for wrong in (request(voice, density=0.3), request(voice, combine=merger_pb2.COMBINE_METHOD_TIES)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stage.merger.Merge(wrong)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        flip(tmp_path / "data", "model.norm.weight")
        damaged = request(voice)
        damaged.request_id = "three"
        error = LoralineError.from_status((await stage.wait((await stage.merger.Merge(damaged)).job.name)).error)
        assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "ARTIFACT_DAMAGED")
        assert "model.safetensors" in error.message
        assert stage.platform.library.list(kind=MODEL, name="merged")[0] == []


def flip(data: Path, name: str) -> None:
    """Flip the lowest bit of a tensor that no adapter touches, in the store's copy of the base: no answer shows it."""
    path = next(data.rglob("models/tiny/v1/model.safetensors"))
    path.chmod(0o644)
    header = read_header(path)
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    with path.open("r+b") as file:
        file.seek(header.data_start + tensor.start)
        byte = file.read(1)[0]
        file.seek(header.data_start + tensor.start)
        file.write(bytes([byte ^ 1]))


async def test_killed_merge_goes_on(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.float32, shard="9KB", num_hidden_layers=8)
    adapter = make_adapter(base)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    early, late = shards[:10], shards[20]
    async with running(tmp_path) as stage:
        _, voice = publish(stage.platform, base, adapter)
        job = (await stage.merger.Merge(request(voice))).job
        out = tmp_path / "data" / "jobs" / job.name / "model"
        out.mkdir(parents=True, exist_ok=True)
        # Opening a pipe that nobody reads waits: the merge stands still here until it is killed.
        held = out / f"{late}.partial"
        os.mkfifo(held)
        pid = await process_with_shards(out, early)
        held.unlink()
        os.kill(pid, signal.SIGKILL)
        done = await stage.wait(job.name)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done.error
        assert done.attempt == 2
        events = await stage.platform.jobs.events(job.name)
        kept = {event.note.fields["file"] for event in events if event.note.reason == "SHARD_RESUMED"}
        assert set(early) <= kept
        assert late not in kept
        assert len(stage.platform.library.list(kind=MODEL, name="merged")[0]) == 1


async def test_cancelled_in_the_middle_of_writing(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.float32, shard="9KB", num_hidden_layers=4)
    adapter = make_adapter(base)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    async with running(tmp_path, stop_grace_seconds=1.0) as stage:
        _, voice = publish(stage.platform, base, adapter)
        job = (await stage.merger.Merge(request(voice))).job
        out = tmp_path / "data" / "jobs" / job.name / "model"
        out.mkdir(parents=True, exist_ok=True)
        os.mkfifo(out / f"{shards[12]}.partial")  # as above: the merge stands still here
        pid = await process_with_shards(out, shards[:6])
        await until(lambda: speed(stage) > 0, "a speed while the merge writes")
        await stage.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
        done = await stage.wait(job.name)
        assert done.state == job_pb2.JOB_STATE_CANCELLED, done.error
        assert 0 < done.progress.step < done.progress.total_steps
        assert not Path(f"/proc/{pid}").exists()
        assert stage.platform.library.list(kind=MODEL, name="merged")[0] == []
        assert not list((tmp_path / "data").rglob("models/merged"))


def speed(stage: Running) -> float:
    metrics = generate_latest(stage.platform.registry).decode()
    return float(metrics.partition("\nloraline_merge_bytes_per_second ")[2].split()[0])


async def process_with_shards(out: Path, names: list[str]) -> int:
    """Wait until the job's process has finished these shards, and return its id."""
    async with asyncio.timeout(300):
        while not all((out / name).exists() for name in names):
            await asyncio.sleep(0.02)
    found = [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and does(entry, out.parent.name)
    ]
    assert len(found) == 1, found
    return found[0]


def does(process: Path, job: str) -> bool:
    """Whether the process does the job; the guardian that it forks looks the same but is not a child of ours."""
    try:
        links = [str(link.readlink()) for link in (process / "fd").iterdir()]
        command, status = (process / "cmdline").read_bytes(), (process / "status").read_text()
    except OSError:
        return False
    ours = f"PPid:\t{os.getpid()}\n" in status
    return ours and b"loraline.core.jobs.child" in command and any(job in link for link in links)


async def test_links_out_of_a_folder_are_followed_by_no_check_or_repair(tmp_path, make_base):
    """What they lead to would be published: by a repair as a file, by a check in its report."""
    async with running(tmp_path) as stage:
        place = tmp_path / "allowed"
        broken, base = make_base("llama", name="one"), make_base("llama", name="two")
        broken, base = broken.rename(place / "broken"), base.rename(place / "base")
        (broken / "tokenizer.json").unlink()
        (base / "tokenizer.json").rename(tmp_path / "outside.json")
        (base / "tokenizer.json").symlink_to(tmp_path / "outside.json")
        at = {name: merger_pb2.ModelLocation(path=str(path)) for name, path in (("broken", broken), ("base", base))}
        repair = merger_pb2.RepairModelRequest(name="mended", model=at["broken"], base_model=at["base"])
        compare = merger_pb2.CheckModelRequest(model=at["broken"], base_model=at["base"])
        for job in ((await stage.merger.RepairModel(repair)).job, (await stage.merger.CheckModel(compare)).job):
            error = LoralineError.from_status((await stage.wait(job.name)).error)
            assert (error.reason, error.metadata["file"]) == ("UNSAFE_PATH", "tokenizer.json")
        assert stage.platform.library.list(kind=MODEL, name="mended")[0] == []
        found = merger_pb2.CheckModelResult()
        check = (await stage.merger.CheckModel(merger_pb2.CheckModelRequest(model=at["base"]))).job
        assert (await stage.wait(check.name)).result.Unpack(found)
        assert [finding.code for finding in found.findings] == ["UNSAFE_PATH"]
        assert not found.loadable


async def test_exports_are_published_with_their_evidence(tmp_path, make_base):
    base = make_base("llama", torch.bfloat16)
    (base / "LICENSE").write_text("Do as you like.")
    async with running(tmp_path) as stage:
        model = stage.platform.library.publish(MODEL, "tiny", base).ref
        request = merger_pb2.ExportModelRequest(name="voice", model=model, format=merger_pb2.EXPORT_FORMAT_OLLAMA)
        request.system_prompt = "Be brief."
        request.parameters.update({"temperature": 0.3})
        done = await stage.wait((await stage.merger.ExportModel(request)).job.name)
        result = merger_pb2.ExportModelResult()
        assert done.result.Unpack(result), done.error
        assert result.measurements[0].within_bound
        folder = stage.platform.library.fetch(result.export)
        assert {"Modelfile", "model.gguf", "README.md", "LICENSE", "export_report.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert "model/tiny:v1" in (folder / "README.md").read_text()
        request.parameters.update({"heat": 1})
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stage.merger.ExportModel(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        request.ClearField("parameters")
        request.ClearField("system_prompt")
        request.name, request.max_kl, request.format = "strict", 1e-12, merger_pb2.EXPORT_FORMAT_GGUF_Q8_0
        error = LoralineError.from_status((await stage.wait((await stage.merger.ExportModel(request)).job.name)).error)
        assert error.reason == "MERGE_CHANGED_MODEL"
        assert stage.platform.library.list(kind=MODEL, name="strict")[0] == []
