"""What callers see when something is wrong: typed details, words, and nothing of the server's inside."""

import asyncio
import errno

import grpc
import grpc.aio
import pytest
import sqlalchemy.exc
from google.rpc import error_details_pb2

from loraline.api.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
from loraline.core.errors import HELP_PAGE, LoralineError, resource_exhausted
from loraline.core.serving.statuses import as_error, fit_status
from loraline.core.serving.validation import check

ASK = inference_pb2.GenerateRequest(prompt="hello")


def raising(exception):
    def behave(_request):
        raise exception

    return behave


async def test_a_typed_error_arrives_whole(server, failure_of):
    from datetime import timedelta

    sent = LoralineError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXHAUSTED",
        "할당량이 없습니다",
        fields={"endpoint": "has no quota"},
        metadata={"endpoint": "a"},
        retry_after=timedelta(seconds=36.5),
        quota={"per-day": "20 a day"},
    )
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        running.answers.behave = raising(sent)
        say = inference_pb2.ChatRequest(messages=[inference_pb2.Message(role="user", content="hello")])
        for call in (stub.Generate(ASK, metadata=running.metadata()), stub.Chat(say, metadata=running.metadata())):
            got = await failure_of(call)
            assert (got.code, got.reason, got.message) == (sent.code, sent.reason, sent.message)
            assert got.fields == sent.fields and got.metadata == sent.metadata and got.quota == sent.quota
            assert got.retry_after == sent.retry_after
    links = error_details_pb2.Help()
    assert any(detail.Unpack(links) for detail in fit_status(sent).details)
    assert links.links[0].url == f"{HELP_PAGE}#quota-exhausted"


async def test_an_unexpected_error_tells_its_id_and_nothing_else(server, failure_of, caplog):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        running.answers.behave = raising(ValueError("password=hunter2 in /srv/private"))
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        failed = await failure_of(stub.Generate(ASK, metadata=running.metadata()))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "UNEXPECTED_ERROR")
    assert failed.metadata["error_id"] in failed.message
    assert "hunter2" not in failed.message + str(failed.metadata) and "ValueError" not in failed.message


@pytest.mark.parametrize(
    ("exception", "code", "reason"),
    [
        (
            sqlalchemy.exc.OperationalError("select", {}, Exception("gone")),
            grpc.StatusCode.UNAVAILABLE,
            "DATABASE_UNAVAILABLE",
        ),
        (OSError(errno.ENOSPC, "full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL"),
        (ConnectionRefusedError(111, "no"), grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE"),
        (TimeoutError(), grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE"),
        (KeyError("x"), grpc.StatusCode.INTERNAL, "UNEXPECTED_ERROR"),
        (resource_exhausted("OWN", "own"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OWN"),
    ],
)
def test_exceptions_map_to_sensible_statuses(exception, code, reason):
    error = as_error(exception, "/a.B/C")
    assert (error.code, error.reason) == (code, reason)


async def test_a_long_error_still_arrives_with_its_reason(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        fields = {f"rows[{i}].content": "값이 비어 있습니다" * 20 for i in range(300)}
        running.answers.behave = raising(
            LoralineError(grpc.StatusCode.INVALID_ARGUMENT, "ROW_INVALID", "한" * 9000, fields=fields)
        )
        failed = await failure_of(stub.Generate(ASK, metadata=running.metadata()))
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ROW_INVALID")
        assert failed.fields and failed.message.endswith("…")


def test_short_errors_are_not_shortened():
    error = LoralineError(grpc.StatusCode.NOT_FOUND, "X", "y", fields={"a": "b"}, metadata={"c": "d"})
    assert fit_status(error) == error.to_status()


async def test_a_unary_request_is_validated_before_the_handler(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        request = trainer_pb2.TrainRequest(name="ok", datasets=[trainer_pb2.WeightedDataset()])
        request.base_model.hub_id = "a/b"
        request.datasets[0].ref.kind = artifact_pb2.ARTIFACT_KIND_DATASET
        request.datasets[0].ref.name = "Bad Name"
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        failed = await failure_of(stub.Train(request, metadata=running.metadata()))
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert list(failed.fields) == ["datasets[0].ref.name"]
        assert failed.message.startswith("datasets[0].ref.name must be 1 to 64 lower-case letters")
        empty = await failure_of(
            inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                inference_pb2.GenerateRequest(), metadata=running.metadata()
            )
        )
        assert empty.message == "prompt must not be empty."
        assert not running.answers.entered.is_set()


async def test_every_message_of_a_client_stream_is_validated(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = artifact_pb2_grpc.ArtifactServiceStub(channel)
        good = artifact_pb2.UploadArtifactRequest(
            header=artifact_pb2.UploadHeader(kind=artifact_pb2.ARTIFACT_KIND_SOURCE, name="raw")
        )
        bad = artifact_pb2.UploadArtifactRequest(
            header=artifact_pb2.UploadHeader(kind=artifact_pb2.ARTIFACT_KIND_SOURCE, name="Not Good")
        )
        failed = await failure_of(stub.UploadArtifact(iter([good, bad]), metadata=running.metadata()))
        assert failed.reason == "INVALID_REQUEST"
        assert list(failed.fields) == ["header.name"]


async def test_a_server_stream_is_validated_before_it_starts(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        failed = await failure_of(
            job_pb2_grpc.JobServiceStub(channel).WatchJob(
                job_pb2.WatchJobRequest(after_sequence=-1), metadata=running.metadata()
            )
        )
        assert set(failed.fields) == {"name", "after_sequence"}
        assert "1 more field is wrong too" in failed.message


async def test_bytes_that_are_no_message_are_refused(server, failure_of):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        call = channel.unary_unary("/loraline.api.job.v1.JobService/GetJob", bytes, bytes)
        failed = await failure_of(call(b"\xff\xff\xff", metadata=running.metadata()))
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (job_pb2.GetJobRequest(), "name", "must not be empty"),
        (job_pb2.GetJobRequest(name="x" * 129), "name", "must have at most 128 characters"),
        (job_pb2.ListJobsRequest(page_size=501), "page_size", "must be"),
        (
            job_pb2.ListJobsRequest.FromString(b"\x10\x4d"),
            "states[0]",
            "must be one of the values that the API defines",
        ),
        (inference_pb2.Message(role="boss"), "role", "must be one of system, user, assistant, tool"),
        (artifact_pb2.GetArtifactRequest(), "ref", "is required"),
        (artifact_pb2.GetArtifactRequest(ref=artifact_pb2.ArtifactRef(name="a")), "ref.kind", "must be set"),
    ],
)
def test_rules_are_said_in_words(message, field, words):
    with pytest.raises(LoralineError) as refused:
        check(message)
    assert words in refused.value.fields[field]


async def test_a_missed_deadline_is_counted_as_such(server, series):
    import urllib.request

    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        running.answers.may_finish.clear()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Generate(ASK, metadata=running.metadata(), timeout=0.3)
        assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.sleep(0.3)
        url = f"http://{running.addresses.metrics}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        handled = [line for line in series(text, "grpc_server_handled_total") if 'grpc_method="Generate"' in line]
        assert [line.rpartition(" ")[2] for line in handled if 'grpc_code="DeadlineExceeded"' in line] == ["1.0"]
