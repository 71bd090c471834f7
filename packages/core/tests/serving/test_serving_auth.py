"""Keys: every method asks for one, roles hold, changes of the file take effect, and nothing secret is stored."""

import asyncio
import json
import stat
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf import message_factory

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import CHAT_METHODS, KeyRing

FILES = (artifact_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR, job_pb2.DESCRIPTOR, trainer_pb2.DESCRIPTOR)
METHODS = [
    (f"/{service.full_name}/{method.name}", method)
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
]


def call(channel, path, method, metadata=()):
    """Call any method with an empty request and return what to await or iterate."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    response = message_factory.GetMessageClass(method.output_type)
    stub = getattr(channel, kind)(path, request_serializer=bytes, response_deserializer=response.FromString)
    return stub(iter([b""]) if method.client_streaming else b"", metadata=metadata, timeout=10)


async def test_every_method_of_every_service_asks_for_a_key(server, failure_of):
    assert len(METHODS) > 30
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        for path, method in METHODS:
            none = await failure_of(call(channel, path, method))
            assert (none.code, none.reason) == (grpc.StatusCode.UNAUTHENTICATED, "MISSING_KEY"), path
            assert "loraline keys create" in none.message
            wrong = await failure_of(call(channel, path, method, running.metadata(running.key[:-1] + "x")))
            assert (wrong.code, wrong.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNKNOWN_KEY"), path


async def test_chat_may_call_what_the_table_says_and_nothing_else(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        chat = running.metadata(running.new_key("chat"))
        await asyncio.sleep(1.1)  # the ring looks at its file once a second
        for path, method in METHODS:
            try:
                answer = call(channel, path, method, chat)
                if method.server_streaming:
                    async for _ in answer:
                        pass
                else:
                    await answer
                refused = False
            except grpc.aio.AioRpcError as error:
                refused = error.code() == grpc.StatusCode.PERMISSION_DENIED
            assert refused == (path not in CHAT_METHODS), path
        denied = await failure_of(
            trainer_pb2_grpc.TrainerServiceStub(channel).Train(trainer_pb2.TrainRequest(), metadata=chat)
        )
        assert denied.reason == "ROLE_MISSING"
        assert "operate" in denied.message
    assert {path for path, _ in METHODS} >= CHAT_METHODS


async def test_the_handler_knows_who_calls(server):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        ask = inference_pb2.GenerateRequest(prompt="hello")
        assert (await stub.Generate(ask, metadata=running.metadata())).model == "first"
        assert (await stub.Generate(ask, metadata=(("x-api-key", running.key),))).model == "first"


async def test_a_revoked_key_is_refused_without_a_restart(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        key = running.new_key("operate")
        await asyncio.sleep(1.1)
        await stub.ListJobs(job_pb2.ListJobsRequest(), metadata=running.metadata(key))
        KeyRing(running.settings.keys_file).revoke("operate-key")
        await asyncio.sleep(1.1)
        refused = await failure_of(stub.ListJobs(job_pb2.ListJobsRequest(), metadata=running.metadata(key)))
        assert refused.reason == "UNKNOWN_KEY"
        await stub.ListJobs(job_pb2.ListJobsRequest(), metadata=running.metadata())


async def test_auth_off_serves_everyone_on_loopback(server):
    async with server(auth="off") as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        await job_pb2_grpc.JobServiceStub(channel).ListJobs(job_pb2.ListJobsRequest())
        answer = await inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(prompt="x")
        )
        assert answer.model == "anonymous"
        assert not running.settings.keys_file.exists()


async def test_auth_off_is_refused_where_others_can_reach(server):
    with pytest.raises(LoralineError) as refused:
        async with server(auth="off", listen="0.0.0.0:0"):
            pass
    assert refused.value.reason == "AUTH_OFF_NOT_LOOPBACK"
    assert "LORALINE_LISTEN" in refused.value.message


async def test_first_start_keeps_a_key_for_the_local_command_line(server, tmp_path):
    async with server() as running:
        client_key = running.settings.data_dir / "client.key"
        assert client_key.read_text().strip() == running.key
        for path in (client_key, running.settings.keys_file):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(running.settings.data_dir.stat().st_mode) == 0o700
    async with server() as again:
        assert again.key == ""  # no second first key


def test_only_a_hash_is_stored(tmp_path: Path):
    ring = KeyRing(tmp_path / "keys.json")
    key = ring.create("ann", ["chat"])
    text = ring.path.read_text()
    assert key.split("_")[2] not in text
    record = json.loads(text)["keys"][0]
    assert record["name"] == "ann" and record["roles"] == ["chat"] and len(record["sha256"]) == 64


def test_keys_that_look_almost_right_are_refused(tmp_path: Path):
    ring = KeyRing(tmp_path / "keys.json")
    key = ring.create("ann", ["operate"])
    _, key_id, secret = key.split("_")
    for wrong in (
        "",
        "lora",
        "lora__",
        f"lora_{key_id}_",
        f"lora_{key_id}_{secret}x",
        f"xora_{key_id}_{secret}",
        secret,
        f"lora_00000000_{secret}",
        "lora_é_\udcff",
    ):
        assert ring.verify(wrong) is None, wrong
    assert ring.verify(key) is not None


def test_two_rings_on_one_file_lose_no_key(tmp_path: Path):
    one, two = KeyRing(tmp_path / "keys.json"), KeyRing(tmp_path / "keys.json")
    one.create("a", ["chat"])
    two.create("b", ["chat"])
    one.create("c", ["operate"])
    assert [record.name for record in two.list()] == ["a", "b", "c"]


def test_a_broken_file_stops_the_start_but_not_a_running_server(tmp_path: Path):
    path = tmp_path / "keys.json"
    ring = KeyRing(path)
    key = ring.create("ann", ["operate"])
    path.write_text('{"keys": [')
    ring._next_check = 0.0
    assert ring.verify(key) is not None
    with pytest.raises(LoralineError) as broken:
        KeyRing(path)
    assert broken.value.reason == "KEYS_FILE_UNREADABLE"
    assert str(path) in broken.value.message


def test_a_deleted_file_means_no_keys(tmp_path: Path):
    ring = KeyRing(tmp_path / "keys.json")
    key = ring.create("ann", ["operate"])
    ring.path.unlink()
    ring._next_check = 0.0
    assert ring.verify(key) is None


def test_names_and_roles_are_checked(tmp_path: Path):
    ring = KeyRing(tmp_path / "keys.json")
    ring.create("ann", ["chat"])
    for name, roles, reason in (
        ("ann", ["chat"], "KEY_NAME_TAKEN"),
        ("bob", ["admin"], "UNKNOWN_ROLE"),
        ("bob", [], "UNKNOWN_ROLE"),
        (" ", ["chat"], "INVALID_KEY_NAME"),
    ):
        with pytest.raises(LoralineError) as refused:
            ring.create(name, roles)
        assert refused.value.reason == reason
    with pytest.raises(LoralineError) as missing:
        ring.revoke("nobody")
    assert missing.value.reason == "KEY_NOT_FOUND" and "ann" in missing.value.message


def test_a_key_is_hashed_once_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every call verifies its key, so a key that proved right must cost no more than a lookup."""
    ring = KeyRing(tmp_path / "keys.json")
    key = ring.create("ann", ["operate"])
    first = ring.verify(key)
    assert first is not None and first.name == "ann"
    monkeypatch.setattr("loraline.core.serving.auth.hashlib", None)
    assert ring.verify(key) == first
    with pytest.raises(AttributeError):
        ring.verify(key + "x")
