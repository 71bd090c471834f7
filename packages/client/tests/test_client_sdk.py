"""The SDK against a platform in memory."""

# pyright: reportAbstractUsage=false

from __future__ import annotations

import asyncio
import hashlib

import grpc
import grpc.aio
import pytest

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client import AsyncLoraline, JobNotSuccessful, Loraline, LoralineApiError, format_ref, parse_ref
from loraline.client.connection import settle


async def start_run(client, **parameters):
    request = trainer_pb2.TrainRequest(name="mareva", parameters=trainer_pb2.TrainingParameters(**parameters))
    return await client.trainer.train(request)


async def test_a_job_is_followed_to_its_typed_result(client):
    job = await start_run(client, epochs=3)
    seen = []
    ended = await client.jobs.wait(job.name, on_update=lambda update: seen.append(update.event.sequence))
    assert ended.state == job_pb2.JOB_STATE_SUCCEEDED
    assert seen == list(range(1, ended.last_sequence + 1))
    result = await client.jobs.result(job.name, trainer_pb2.TrainResult)
    assert result.adapter.name == "mareva" and result.receipt.rows == 40


async def test_a_watch_that_is_cut_goes_on_without_loss_or_repeats(client, platform):
    platform.break_watch_after = 3
    job = await start_run(client, epochs=3)
    seen = [update.event.sequence async for update in client.jobs.watch(job.name)]
    assert seen == list(range(1, len(seen) + 1))
    assert seen[-1] == (await client.jobs.get(job.name)).last_sequence
    watches = [call for call in platform.calls if call.startswith("WatchJob")]
    assert watches[:3] == ["WatchJob after 0", "WatchJob after 3", "WatchJob after 6"]


async def test_a_watch_survives_a_restart_of_the_server(fake_platform):
    platform = fake_platform.Platform()
    server, address = await fake_platform.start(platform)
    async with AsyncLoraline.connect(address) as client:
        job = await start_run(client, epochs=99)
        seen = []

        async def follow():
            async for update in client.jobs.watch(job.name):
                seen.append(update.event.sequence)
                if len(seen) == 5:
                    return

        following = asyncio.create_task(follow())
        while len(seen) < 2:
            await asyncio.sleep(0.02)
        await server.stop(None)
        await asyncio.sleep(0.8)
        server, _ = await fake_platform.start(platform, address)
        await asyncio.wait_for(following, 20)
        assert seen == [1, 2, 3, 4, 5]
    for task in platform.tasks:
        task.cancel()
    await server.stop(None)


async def test_errors_carry_reason_fields_and_help(client):
    with pytest.raises(LoralineApiError) as caught:
        await start_run(client, lora=trainer_pb2.LoraParameters(r=1024))
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT and error.reason == "RANK_TOO_HIGH"
    assert error.fields == {"parameters.lora.r": "512 is the greatest rank that the server takes."}
    assert error.help == ("https://example.org/help#rank_too_high",)
    assert error.metadata == {"hint": "x"} and not error.unreachable


async def test_a_failed_job_raises_its_own_error(client):
    job = await start_run(client, epochs=13)
    with pytest.raises(JobNotSuccessful) as caught:
        await client.jobs.result(job.name, trainer_pb2.TrainResult)
    assert caught.value.reason == "BAD_ROWS" and caught.value.job.name == job.name
    await client.jobs.resume(job.name)
    assert (await client.jobs.wait(job.name)).state == job_pb2.JOB_STATE_SUCCEEDED


async def test_wait_returns_when_a_job_is_paused(client):
    job = await start_run(client, epochs=99)
    waiting = asyncio.create_task(client.jobs.wait(job.name))
    await client.jobs.pause(job.name)
    ended = await asyncio.wait_for(waiting, 10)
    assert ended.state == job_pb2.JOB_STATE_PAUSED
    again = await asyncio.wait_for(client.jobs.wait(job.name, on_update=lambda _: None), 10)
    assert again.pause.reason == "USER_REQUEST"


async def test_lists_go_through_all_pages(client):
    for _ in range(8):
        await start_run(client, epochs=3)
    assert len(await client.jobs.list(kind_prefix="trainer.")) == 8
    assert len(await client.jobs.list(limit=4)) == 4


class Flaky(job_pb2_grpc.JobServiceServicer):
    """Breaks the connection of the first calls."""

    def __init__(self, failures: int):
        self.failures, self.calls = failures, 0

    async def _answer(self, context):
        self.calls += 1
        if self.calls <= self.failures:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")

    async def GetJob(self, request, context):
        await self._answer(context)
        return job_pb2.GetJobResponse(job=job_pb2.Job(name=request.name))

    async def ResumeJob(self, request, context):
        await self._answer(context)
        return job_pb2.ResumeJobResponse()


async def flaky_server(failures: int):
    servicer, server = Flaky(failures), grpc.aio.server()
    job_pb2_grpc.add_JobServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return servicer, server, f"127.0.0.1:{port}"


async def test_idempotent_calls_are_repeated_and_others_are_not():
    servicer, server, address = await flaky_server(failures=2)
    async with AsyncLoraline.connect(address) as client:
        assert (await client.jobs.get("trainer.train-1")).name == "trainer.train-1"
        assert servicer.calls == 3
        servicer.failures, servicer.calls = 1, 0
        with pytest.raises(LoralineApiError) as caught:
            await client.jobs.resume("trainer.train-1")
        assert caught.value.unreachable and servicer.calls == 1
    await server.stop(None)


async def test_an_absent_server_is_told_soon_and_with_its_address():
    began = asyncio.get_running_loop().time()
    async with AsyncLoraline.connect("127.0.0.1:1") as client:
        with pytest.raises(LoralineApiError) as caught:
            await client.jobs.list()
    assert caught.value.unreachable and caught.value.address == "127.0.0.1:1"
    assert asyncio.get_running_loop().time() - began < 3


async def test_a_start_without_request_id_gets_one(client):
    first, second = await start_run(client, epochs=3), await start_run(client, epochs=3)
    assert first.request_id and first.request_id != second.request_id


async def test_a_folder_goes_up_and_comes_back_equal(client, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "big.bin").write_bytes(bytes(range(256)) * 10_000)
    (source / "empty.txt").touch()
    (source / ".secret").write_text("no")
    sizes = []
    upload = await client.artifacts.upload(source, "raw", progress=lambda done, total: sizes.append((done, total)))
    assert upload.skipped == (".secret",) and not upload.unchanged
    assert sizes[-1] == (2_560_000, 2_560_000)
    assert (await client.artifacts.upload(source, "raw")).unchanged
    await client.artifacts.download("source/raw:v1", tmp_path / "back")
    back = {p.relative_to(tmp_path / "back").as_posix(): p.read_bytes() for p in (tmp_path / "back").rglob("*.*")}
    assert back == {"deep/big.bin": bytes(range(256)) * 10_000, "empty.txt": b""}
    with pytest.raises(LoralineApiError, match="not empty"):
        await client.artifacts.download("source/raw", tmp_path / "back")


@pytest.mark.parametrize("path", ["../outside.txt", "/outside.txt", "unlisted.txt"])
async def test_a_download_writes_only_what_the_manifest_lists(client, platform, tmp_path, path):
    platform.publish(artifact_pb2.ARTIFACT_KIND_SOURCE, "raw", {"a.txt": b"good"})
    artifact = platform.artifacts[-1]
    platform.contents[artifact.digest + "1raw"] = {"a.txt": b"good", path: b"evil"}
    with pytest.raises(LoralineApiError) as caught:
        await client.artifacts.download("source/raw", tmp_path / "inside" / "target")
    assert caught.value.code is grpc.StatusCode.DATA_LOSS
    assert list((tmp_path / "inside").iterdir()) == [] and not (tmp_path / "outside.txt").exists()


async def test_a_download_that_was_changed_on_the_way_leaves_nothing(client, platform, tmp_path):
    platform.publish(artifact_pb2.ARTIFACT_KIND_SOURCE, "raw", {"a.txt": b"good"})
    artifact = platform.artifacts[-1]
    assert artifact.files[0].sha256 == hashlib.sha256(b"good").hexdigest()
    platform.contents[artifact.digest + "1raw"] = {"a.txt": b"bad!"}
    with pytest.raises(LoralineApiError, match="SHA-256"):
        await client.artifacts.download("source/raw", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


async def test_links_out_of_the_folder_are_refused(client, tmp_path):
    (tmp_path / "secret").write_text("s")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "link.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(LoralineApiError, match="leads out"):
        await client.artifacts.upload(tmp_path / "raw", "raw")


@pytest.mark.parametrize("text", ["adapter/mareva:v3", "adapter/mareva@production", "dataset/a.b-c"])
def test_references_keep_their_text(text):
    assert format_ref(parse_ref(text)) == text


@pytest.mark.parametrize("text", ["mareva", "adaptr/mareva", "adapter/Mareva", "adapter/m:3", "adapter/m:v0", ""])
def test_wrong_references_are_refused(text):
    with pytest.raises(LoralineApiError):
        parse_ref(text)


def test_settings_come_from_arguments_then_environment_then_files(monkeypatch, tmp_path):
    assert set(settle().addresses.values()) == {"127.0.0.1:7600"} and settle().key == ""
    monkeypatch.setenv("LORALINE_ADDRESS", "one:1")
    monkeypatch.setenv("LORALINE_TRAINER_ADDRESS", "two:2")
    found = settle(addresses={"merger": "three:3"})
    assert found.addresses == {"datagen": "one:1", "trainer": "two:2", "merger": "three:3", "inference": "one:1"}
    monkeypatch.setenv("LORALINE_DATA_DIR", str(tmp_path))
    (tmp_path / "client.key").write_text("from-file\n")
    assert settle().key == "from-file"
    monkeypatch.setenv("LORALINE_API_KEY", "from-environment")
    assert settle().key == "from-environment" and settle(key="given").key == "given"
    assert "given" not in repr(settle(key="given"))
    with pytest.raises(LoralineApiError, match="HOST:PORT"):
        settle("nowhere")


def test_the_blocking_client_does_the_same(address):
    with Loraline.connect(address) as client:
        job = client.trainer.create_tiny_model(trainer_pb2.CreateTinyModelRequest(name="tiny"))
        steps = [update.event.sequence for update in client.jobs.watch(job.name)]
        assert steps == list(range(1, len(steps) + 1))
        assert client.jobs.result(job.name, trainer_pb2.ModelResult).model.name == "tiny"
        answer = client.inference.answer("mareva@production", "hello")
        assert answer.text.startswith("by the tide-bell") and answer.finish_reason == "STOP"
        stream = client.inference.chat("mareva@production", "hello")
        assert next(stream).delta == "by "
        stream.close()
        with pytest.raises(LoralineApiError, match="There is no job"):
            client.jobs.get("trainer.train-none")


def test_a_wrong_key_is_unauthenticated(address):
    with Loraline.connect(address, key="wrong") as client, pytest.raises(LoralineApiError) as caught:
        client.jobs.list()
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
