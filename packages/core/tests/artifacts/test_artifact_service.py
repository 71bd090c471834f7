"""ArtifactService over a real gRPC channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from loraline.api.artifact.v1 import artifact_pb2 as pb
from loraline.api.artifact.v1 import artifact_pb2_grpc
from loraline.core.artifacts.service import ArtifactService
from loraline.core.errors import LoralineError

SOURCE = pb.ARTIFACT_KIND_SOURCE


class _Errors(grpc.aio.ServerInterceptor):
    """Maps LoralineError to a status, as the platform's interceptor does."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)

        def typed(behaviour: Any, streaming: bool) -> Any:
            async def unary(request: Any, context: Any) -> Any:
                try:
                    return await behaviour(request, context)
                except LoralineError as error:
                    await context.abort(error.code, error.message)

            async def stream(request: Any, context: Any) -> Any:
                try:
                    async for item in behaviour(request, context):
                        yield item
                except LoralineError as error:
                    await context.abort(error.code, error.message)

            return stream if streaming else unary

        for name in ("unary_unary", "unary_stream", "stream_unary"):
            behaviour = getattr(handler, name)
            if behaviour is not None:
                return handler._replace(**{name: typed(behaviour, name == "unary_stream")})
        return handler


@pytest.fixture
async def stub(place: Any) -> AsyncIterator[Any]:
    """A stub of a server on a free port."""
    server = grpc.aio.server(interceptors=[_Errors()])
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(place.library), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield artifact_pb2_grpc.ArtifactServiceStub(channel)
    await server.stop(None)


def parts(*files: tuple[str, bytes], name: str = "up") -> list[pb.UploadArtifactRequest]:
    header = pb.UploadHeader(kind=SOURCE, name=name)
    header.facts.update({"rows": 2})
    chunks = [pb.UploadArtifactRequest(chunk=pb.FileChunk(path=path, data=data)) for path, data in files]
    return [pb.UploadArtifactRequest(header=header), *chunks]


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_upload_then_download(stub: Any, place: Any) -> None:
    big = bytes(range(256)) * 10_000
    files = [
        ("card.md", b"hello"),
        ("empty", b""),
        *(("sub/big", big[i : i + 1_000_000]) for i in range(0, len(big), 1_000_000)),
    ]
    made = await stub.UploadArtifact(iter(parts(*files)))
    assert (made.artifact.ref.version, made.unchanged) == (1, False)
    assert made.artifact.facts["rows"] == 2
    assert (await stub.UploadArtifact(iter(parts(*files)))).unchanged
    got: dict[str, bytes] = {}
    first: pb.Artifact | None = None
    async for message in stub.DownloadArtifact(pb.DownloadArtifactRequest(ref=made.artifact.ref)):
        if message.WhichOneof("part") == "artifact":
            first = message.artifact
        else:
            assert len(message.chunk.data) <= 1024 * 1024
            got[message.chunk.path] = got.get(message.chunk.path, b"") + message.chunk.data
    assert first == made.artifact
    assert got == {"card.md": b"hello", "empty": b"", "sub/big": big}
    verified = await stub.VerifyArtifact(pb.VerifyArtifactRequest(ref=made.artifact.ref))
    assert verified.verified_bytes == len(big) + 5
    assert not list(place.library.upload_dir.iterdir())


async def test_download_of_damaged_file_ends_with_data_loss(stub: Any, place: Any) -> None:
    made = (await stub.UploadArtifact(iter(parts(("a", b"0123456789"))))).artifact
    place.damage(made, "a", lambda content: b"X" + content[1:])

    async def download() -> None:
        async for _ in stub.DownloadArtifact(pb.DownloadArtifactRequest(ref=made.ref)):
            pass

    error = await refused(download())
    assert error.code() == grpc.StatusCode.DATA_LOSS
    assert "a:" in (error.details() or "")


async def test_uploads_that_are_refused_leave_nothing(stub: Any, place: Any) -> None:
    chunk = parts(("a", b"1"))[1]
    header = parts()[0]
    for messages in ([], [chunk], [header, chunk, header], parts(("../a", b"1")), parts(("a/../../a", b"1")), parts()):
        error = await refused(stub.UploadArtifact(iter(messages)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert place.stored() == {}
    assert not place.library.upload_dir.exists() or not list(place.library.upload_dir.iterdir())
    assert not (await stub.ListArtifacts(pb.ListArtifactsRequest())).artifacts


async def test_aliases_and_deletion(stub: Any) -> None:
    ref = (await stub.UploadArtifact(iter(parts(("a", b"1"))))).artifact.ref
    change = (await stub.SetAlias(pb.SetAliasRequest(ref=ref, alias="production"))).change
    assert (change.from_version, change.to_version) == (0, 1)
    by_alias = pb.ArtifactRef(kind=SOURCE, name="up", alias="production")
    assert (await stub.GetArtifact(pb.GetArtifactRequest(ref=by_alias))).artifact.ref == ref
    error = await refused(stub.DeleteArtifact(pb.DeleteArtifactRequest(ref=ref)))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    await stub.DeleteAlias(pb.DeleteAliasRequest(kind=SOURCE, name="up", alias="production"))
    changes = (await stub.ListAliasChanges(pb.ListAliasChangesRequest(kind=SOURCE, name="up"))).changes
    assert [(c.from_version, c.to_version) for c in changes] == [(1, 0), (0, 1)]
    error = await refused(stub.DeleteArtifact(pb.DeleteArtifactRequest(ref=pb.ArtifactRef(kind=SOURCE, name="up"))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    await stub.DeleteArtifact(pb.DeleteArtifactRequest(ref=ref))
    assert (await refused(stub.GetArtifact(pb.GetArtifactRequest(ref=ref)))).code() == grpc.StatusCode.NOT_FOUND
