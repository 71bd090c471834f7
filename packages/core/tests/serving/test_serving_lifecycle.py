"""From start to stop: ports, readiness, draining, and the messages of a start that fails."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.core.errors import LoralineError
from loraline.core.folder_lock import sole_user

INFERENCE = "loraline.api.inference.v1.InferenceService"
JOBS = "loraline.api.job.v1.JobService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ASK = inference_pb2.GenerateRequest(prompt="hello")


async def health(channel, service=""):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status


async def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.05)


async def test_health_needs_no_key_and_follows_readiness(server):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        assert [await health(channel, name) for name in ("", INFERENCE, JOBS, "liveness")] == [SERVING] * 4
        running.reason[0] = "The engine is loading."
        await until(lambda: _is(channel, INFERENCE, NOT_SERVING))
        assert await health(channel) == NOT_SERVING
        assert await health(channel, "liveness") == SERVING  # a restart would not load it any sooner
        assert await health(channel, JOBS) == SERVING  # jobs can be watched while the engine loads
        status, reasons = await asyncio.to_thread(get, running.addresses.metrics, "/healthz")
        assert status == 503 and "The engine is loading." in reasons
        running.reason[0] = ""
        await until(lambda: _is(channel, INFERENCE, SERVING))
        status, _ = await asyncio.to_thread(get, running.addresses.metrics, "/healthz")
        assert status == 200
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health(channel, "no.such.Service")
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def _is(channel, service, status):
    return await health(channel, service) == status


def get(address, path):
    """Return status and body of a plain HTTP GET."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


async def test_health_is_not_serving_when_the_database_is_gone(server):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        database = running.settings.data_dir / "loraline.db"
        elsewhere = database.with_name("elsewhere")
        elsewhere.mkdir()
        # The journal belongs to the database: without it the file would come back older than it went.
        for file in database.parent.glob("loraline.db*"):
            file.rename(elsewhere / file.name)
        database.mkdir()  # a folder cannot be opened as a database
        # Connections that are open already would go on with the moved file.
        running.component.extra["platform"].database.engine.dispose()
        await until(lambda: _is(channel, JOBS, NOT_SERVING))
        assert await database_ready(running) == "0.0", "the alert DatabaseUnreachable waits for it"
        assert await health(channel) == NOT_SERVING
        assert await health(channel, "liveness") == SERVING  # nor would it bring the database back
        running.component.extra["platform"].database.engine.dispose()
        for file in database.parent.glob("loraline.db-*"):
            file.unlink()
        database.rmdir()
        for file in elsewhere.iterdir():
            file.rename(database.parent / file.name)
        await until(lambda: _is(channel, JOBS, SERVING))
        assert await database_ready(running) == "1.0"


async def database_ready(running):
    """Return loraline_ready of the database, as Prometheus reads it."""
    _, text = await asyncio.to_thread(get, running.addresses.metrics, "/metrics")
    (line,) = [line for line in text.splitlines() if line.startswith('loraline_ready{part="database"}')]
    return line.split()[-1]


async def test_a_call_in_flight_finishes_while_draining(server):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        running.answers.may_finish.clear()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = asyncio.ensure_future(stub.Generate(ASK, metadata=running.metadata()))
        await running.answers.entered.wait()
        running.stop.set()
        assert (await watch.read()).status == NOT_SERVING
        await asyncio.sleep(0.3)
        assert not running.task.done() and not call.done()
        with pytest.raises(OSError):  # no new connections
            await asyncio.to_thread(connect, running.addresses.grpc)
        running.answers.may_finish.set()
        assert (await call).model == "first"
        await asyncio.wait_for(running.task, 5)


def connect(address):
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=2).close()


async def test_streams_that_never_end_do_not_delay_the_stop(server, failure_of):
    async with server(stop_grace_seconds=30) as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        begun = time.monotonic()
        running.stop.set()
        assert (await watch.read()).status == NOT_SERVING
        ended = await failure_of(watch.read())
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
        assert ended.retry_after is not None
        await running.task
        assert time.monotonic() - begun < 5


async def test_a_call_that_outlasts_the_grace_is_cut(server):
    async with server(stop_grace_seconds=-4.5) as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        running.answers.may_finish.clear()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = asyncio.ensure_future(stub.Generate(ASK, metadata=running.metadata()))
        await running.answers.entered.wait()
        running.stop.set()
        await asyncio.wait_for(running.task, 5)
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_taken_port_is_named_with_its_setting(server):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for setting in ("listen", "metrics_listen"):
            with pytest.raises(LoralineError) as taken:
                async with server(**{setting: address}):
                    pass
            assert taken.value.reason == "PORT_TAKEN"
            assert address in taken.value.message and f"LORALINE_{setting.upper()}" in taken.value.message


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "LORALINE_DATABASE_URL,LORALINE_STORE_URL"),
        ({"store_url": "s3://bucket"}, "LORALINE_DATABASE_URL"),
        ({"database_url": "postgresql://loraline@nowhere.invalid/loraline"}, "LORALINE_STORE_URL"),
    ],
)
async def test_what_one_server_keeps_for_itself_is_refused_to_several(server, tmp_path, given, named):
    with pytest.raises(LoralineError) as refused:
        async with server(replicas=2, data_dir=tmp_path / "data", **given):
            pass
    assert (refused.value.reason, refused.value.metadata["settings"]) == ("REPLICAS_NEED_SHARED_STATE", named)
    assert not (tmp_path / "data").exists(), "nothing is left behind"


async def test_two_servers_never_share_a_port(server, tmp_path):
    async with server() as running:
        with pytest.raises(LoralineError) as taken:
            async with server(listen=running.addresses.grpc, data_dir=tmp_path / "other"):
                pass
        assert taken.value.reason == "PORT_TAKEN"


async def test_reflection_needs_a_key_and_its_setting(server, failure_of):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    async with server(reflection=True) as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        refused = await failure_of(stub.ServerReflectionInfo(iter([ask])))
        assert refused.reason == "MISSING_KEY"
        names = set()
        async for answer in stub.ServerReflectionInfo(iter([ask]), metadata=running.metadata()):
            names |= {service.name for service in answer.list_services_response.service}
        assert {INFERENCE, JOBS, "loraline.api.artifact.v1.ArtifactService", "grpc.health.v1.Health"} <= names
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as off:
            async for _ in stub.ServerReflectionInfo(iter([ask]), metadata=running.metadata()):
                pass
        assert off.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_messages_above_four_mebibytes_pass(server):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        big = inference_pb2.GenerateRequest(prompt="한" * 1_500_000)
        assert big.ByteSize() > 4 * 1024 * 1024
        assert (await stub.Generate(big, metadata=running.metadata())).model == "first"


def start(tmp_path, stdout=subprocess.PIPE, **environment):
    """Start `run([])` in a process of its own."""
    values = {
        "LORALINE_DATA_DIR": str(tmp_path / "d"),
        "LORALINE_LISTEN": "127.0.0.1:0",
        "LORALINE_METRICS_LISTEN": "127.0.0.1:0",
    }
    return subprocess.Popen(
        [sys.executable, "-c", "from loraline.core.serving.server import run; run([])"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | values | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_run_says_what_listens_where_and_ends_on_sigterm(tmp_path):
    process = start(tmp_path)
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(5)]
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    text = "".join(lines)
    assert "Loraline listens on 127.0.0.1:" in lines[0]
    assert str(tmp_path / "d") in text and "/metrics" in text
    key = (tmp_path / "d" / "client.key").read_text().strip()
    assert key not in text + log  # a pipe gets the file's path, the log nothing
    assert str(tmp_path / "d" / "client.key") in lines[4]
    assert all(json.loads(line) for line in log.splitlines())  # nothing but JSON beside the banner's stream


def test_a_terminal_gets_the_first_key_once(tmp_path):
    ours, theirs = os.openpty()
    process = start(tmp_path, stdout=theirs)
    os.close(theirs)
    with os.fdopen(ours, closefd=True) as screen:
        lines = [screen.readline() for _ in range(5)]
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    key = (tmp_path / "d" / "client.key").read_text().strip()
    assert key in lines[4]
    assert key not in log


async def test_a_second_server_on_the_same_folder_is_refused(server, tmp_path):
    async with server():
        with pytest.raises(LoralineError) as taken:
            async with server():
                pass
        error = taken.value
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DATA_DIR_IN_USE")
        assert f"process {os.getpid()}" in error.message and "--data-dir" in error.message
    async with server():  # let go with the first
        pass


def test_the_folder_is_free_again_after_a_kill(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from loraline.core.folder_lock import sole_user\n"
        "with sole_user(Path(sys.argv[1]), ['trainer']): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    with sole_user(tmp_path, ["merger"]):  # another stage may share the folder
        pass
    with pytest.raises(LoralineError, match=f"process {process.pid}"), sole_user(tmp_path, ["trainer"]):
        pass
    process.kill()
    process.wait(10)
    with sole_user(tmp_path, ["trainer"]):
        pass


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"LORALINE_LISTEN": "nowhere"}, "LORALINE_LISTEN"),
        ({"LORALINE_DATABASE_URL": "mysql://x"}, "LORALINE_DATABASE_URL"),
        ({"LORALINE_AUTH": "off", "LORALINE_LISTEN": "0.0.0.0:0"}, "LORALINE_AUTH"),
        ({"LORALINE_AUTH": "maybe"}, "auth"),
        ({"LORALINE_STORE_URL": "ftp://x"}, "LORALINE_STORE_URL"),
        (
            {
                "LORALINE_STORE_URL": "s3://bucket",
                "LORALINE_S3_ENDPOINT": "127.0.0.1:1",
                "LORALINE_S3_ACCESS_KEY": "a",
                "LORALINE_S3_SECRET_KEY": "b",
            },
            "LORALINE_S3_ENDPOINT",
        ),
        ({"LORALINE_DATABASE_URL": "postgresql://u:hidden@127.0.0.1:1/x"}, "LORALINE_DATABASE_URL"),
        ({"LORALINE_TLS_CERT": "/nowhere.pem"}, "LORALINE_TLS_KEY"),
        ({"LORALINE_DATA_DIR": "/dev/null/x"}, "LORALINE_DATA_DIR"),
    ],
)
def test_a_start_that_fails_is_one_message(tmp_path, environment, words):
    process = start(tmp_path, **environment)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    message = [line for line in log.splitlines() if line.startswith("loraline: ")]
    assert len(message) == 1 and words in message[0]
    assert "Traceback" not in log and "hidden" not in log
