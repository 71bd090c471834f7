"""ArtifactService: the library behind gRPC. Blocking work runs in threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

from loraline.api.artifact.v1 import artifact_pb2 as pb
from loraline.api.artifact.v1 import artifact_pb2_grpc
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.manifest import FileEntry
from loraline.core.artifacts.uploads import Upload
from loraline.core.errors import invalid_argument
from loraline.core.serving.auth import current_principal

_PREFETCH = 4  # pieces of 1 MiB that a download holds ready while the network takes the one before


def _actor() -> str:
    principal = current_principal()
    return principal.name if principal is not None else ""


class ArtifactService(artifact_pb2_grpc.ArtifactServiceServicer):
    """Serves one library; see the contract for what each method answers."""

    def __init__(self, library: ArtifactLibrary):
        self._library = library

    async def GetArtifact(self, request: pb.GetArtifactRequest, context: Any) -> pb.GetArtifactResponse:
        """Return one artifact with its files."""
        return pb.GetArtifactResponse(artifact=await asyncio.to_thread(self._library.get, request.ref))

    async def ListArtifacts(self, request: pb.ListArtifactsRequest, context: Any) -> pb.ListArtifactsResponse:
        """Return a page of artifacts."""
        found, token = await asyncio.to_thread(
            self._library.list,
            kind=request.kind,
            name=request.name,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListArtifactsResponse(artifacts=found, next_page_token=token)

    async def UploadArtifact(
        self, request_iterator: AsyncIterator[pb.UploadArtifactRequest], context: Any
    ) -> pb.UploadArtifactResponse:
        """Collect the files in a folder of their own and publish it; the folder goes in any case."""
        upload: Upload | None = None
        try:
            async for request in request_iterator:
                if upload is None:
                    upload = await self._begin(request)
                elif request.WhichOneof("part") == "chunk":
                    await asyncio.to_thread(upload.add, request.chunk.path, request.chunk.data)
                else:
                    message = "Only the first message of an upload is a header; files follow as chunks."
                    raise invalid_argument("UPLOAD_OUT_OF_ORDER", message, header=message)
            if upload is None:
                message = "The upload ended before its header."
                raise invalid_argument("UPLOAD_OUT_OF_ORDER", message, header=message)
            published = await asyncio.to_thread(upload.publish, self._library)
            return pb.UploadArtifactResponse(artifact=published.artifact, unchanged=published.unchanged)
        finally:
            if upload is not None:
                await asyncio.shield(asyncio.to_thread(upload.discard))

    async def _begin(self, request: pb.UploadArtifactRequest) -> Upload:
        if request.WhichOneof("part") != "header":
            message = "The first message of an upload is its header."
            raise invalid_argument("UPLOAD_OUT_OF_ORDER", message, header=message)
        return await asyncio.to_thread(Upload, self._library.upload_dir, request.header)

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """Stream the files in order; DATA_LOSS ends the stream at the first that is not as it was."""
        artifact, files = await asyncio.to_thread(self._library.select, request.ref, tuple(request.paths))
        yield pb.DownloadArtifactResponse(artifact=artifact)
        for entry in files:
            async for data in self._pieces(artifact.ref, entry):
                chunk = pb.FileChunk(path=entry.path, data=data)
                yield pb.DownloadArtifactResponse(chunk=chunk)

    async def _pieces(self, ref: pb.ArtifactRef, entry: FileEntry) -> AsyncIterator[bytes]:
        """Read pieces in a thread, a few ahead; an empty file is one empty piece, so that it is seen at all."""
        pieces = self._library.stream(ref, entry)
        sent = False

        while batch := await asyncio.to_thread(lambda: list(islice(pieces, _PREFETCH))):
            for piece in batch:
                sent = True
                yield piece
        if not sent:
            yield b""

    async def VerifyArtifact(self, request: pb.VerifyArtifactRequest, context: Any) -> pb.VerifyArtifactResponse:
        """Read every file again."""
        verified = await asyncio.to_thread(self._library.verify, request.ref)
        artifact = await asyncio.to_thread(self._library.get, request.ref)
        return pb.VerifyArtifactResponse(artifact=artifact, verified_bytes=verified)

    async def DeleteArtifact(self, request: pb.DeleteArtifactRequest, context: Any) -> pb.DeleteArtifactResponse:
        """Delete one version."""
        await asyncio.to_thread(self._library.delete, request.ref, force=request.force)
        return pb.DeleteArtifactResponse()

    async def SetAlias(self, request: pb.SetAliasRequest, context: Any) -> pb.SetAliasResponse:
        """Point an alias at a version."""
        change = await asyncio.to_thread(self._library.set_alias, request.ref, request.alias, _actor())
        return pb.SetAliasResponse(change=change)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Any) -> pb.DeleteAliasResponse:
        """Remove an alias."""
        change = await asyncio.to_thread(
            self._library.delete_alias, request.kind, request.name, request.alias, _actor()
        )
        return pb.DeleteAliasResponse(change=change)

    async def ListAliasChanges(self, request: pb.ListAliasChangesRequest, context: Any) -> pb.ListAliasChangesResponse:
        """Return a page of alias moves."""
        changes, token = await asyncio.to_thread(
            self._library.alias_changes,
            request.kind,
            request.name,
            request.alias,
            request.page_size,
            request.page_token,
        )
        return pb.ListAliasChangesResponse(changes=changes, next_page_token=token)
