"""Artifacts: publish folders, fetch them verified, move aliases."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from loraline.client import tracing
from loraline.client.calls import WORK_SECONDS, Endpoints, may_repeat, pages
from loraline.client.errors import LoralineApiError
from loraline.client.refs import format_ref, parse_kind, parse_ref

CHUNK_BYTES = 1024 * 1024
Ref = str | artifact_pb2.ArtifactRef
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Upload:
    """A published folder. `unchanged` tells that equal content was there already and nothing was stored."""

    artifact: artifact_pb2.Artifact
    unchanged: bool
    skipped: tuple[str, ...] = ()
    """Hidden files that were left out."""


class AsyncArtifacts:
    """`client.artifacts`. References are given as text (`adapter/mareva:v3`) or as ArtifactRef."""

    def __init__(self, endpoints: Endpoints):
        self._endpoint = endpoints.of("trainer")
        self._stub: artifact_pb2_grpc.ArtifactServiceAsyncStub = artifact_pb2_grpc.ArtifactServiceStub(
            self._endpoint.channel
        )  # type: ignore[assignment]

    async def show(self, ref: Ref) -> artifact_pb2.Artifact:
        """Return one artifact with its file list."""
        request = artifact_pb2.GetArtifactRequest(ref=as_ref(ref))
        return (await self._endpoint.unary(self._stub.GetArtifact, request)).artifact

    async def list(self, *, kind: str = "", name: str = "", limit: int = 0) -> list[artifact_pb2.Artifact]:
        """Return artifacts without file lists, newest first; `limit` 0 means all."""
        number = parse_kind(kind) if kind else artifact_pb2.ARTIFACT_KIND_UNSPECIFIED

        async def page(token: str) -> artifact_pb2.ListArtifactsResponse:
            request = artifact_pb2.ListArtifactsRequest(
                kind=number, name=name, page_size=min(limit or 200, 500), page_token=token
            )
            return await self._endpoint.unary(self._stub.ListArtifacts, request)

        found: list[artifact_pb2.Artifact] = []
        async for artifact in pages(page, lambda reply: reply.artifacts):
            found.append(artifact)
            if limit and len(found) >= limit:
                break
        return found

    async def upload(
        self,
        folder: Path | str,
        name: str,
        *,
        kind: str = "source",
        facts: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Upload:
        """Publish a folder (or one file) as a new version; equal content gives the version back that is there.

        Hidden files are left out and named in the reply. `progress` is called with bytes sent and bytes in all.
        """
        files, skipped = await asyncio.to_thread(_files_of, Path(folder))
        header = artifact_pb2.UploadHeader(kind=parse_kind(kind), name=name)
        if facts:
            json_format.ParseDict(dict(facts), header.facts)
        patience = self._endpoint.patience()
        while True:
            metadata = self._endpoint.metadata + tracing.headers()
            call = self._stub.UploadArtifact(_upload_parts(header, files, progress), metadata=metadata)
            try:
                reply = await call
            except grpc.aio.AioRpcError as error:
                failure = self._endpoint.failed(error)
                if not may_repeat(failure):
                    raise failure from None
                await patience.wait_or_raise(failure)
            else:
                self._endpoint.reached = True
                return Upload(reply.artifact, reply.unchanged, skipped)

    async def download(
        self, ref: Ref, folder: Path | str, *, progress: Progress | None = None
    ) -> artifact_pb2.Artifact:
        """Fetch an artifact into a folder that is new or empty; every file is verified before the folder appears.

        `progress` is called with bytes received and bytes in all.
        """
        target = _empty_target(Path(folder))
        artifact = await self.show(ref)
        workdir = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            patience = self._endpoint.patience()
            while not await self._receive(artifact, workdir / "files", progress, patience):
                pass
            await asyncio.to_thread((workdir / "files").replace, target)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        return artifact

    async def _receive(
        self, artifact: artifact_pb2.Artifact, folder: Path, progress: Progress | None, patience
    ) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        receiver = _Receiver(artifact, folder, progress)
        request = artifact_pb2.DownloadArtifactRequest(ref=artifact.ref)
        try:
            async for part in self._endpoint.stream(self._stub.DownloadArtifact, request):
                if part.WhichOneof("part") == "chunk":
                    await asyncio.to_thread(receiver.write, part.chunk)
        except LoralineApiError as failure:
            if not may_repeat(failure):
                raise
            await patience.wait_or_raise(failure)
            return False
        finally:
            receiver.close()
        receiver.check_complete()
        return True

    async def verify(self, ref: Ref) -> artifact_pb2.VerifyArtifactResponse:
        """Have the server read every file again; DATA_LOSS lists those that differ from the manifest."""
        request = artifact_pb2.VerifyArtifactRequest(ref=as_ref(ref))
        return await self._endpoint.unary(self._stub.VerifyArtifact, request, timeout=WORK_SECONDS)

    async def delete(self, ref: Ref, *, force: bool = False) -> None:
        """Delete one version that nobody needs; `force` also when other artifacts were made from it."""
        request = artifact_pb2.DeleteArtifactRequest(ref=as_ref(ref), force=force)
        await self._endpoint.unary(self._stub.DeleteArtifact, request, idempotent=False)

    async def set_alias(self, ref: Ref, alias: str) -> artifact_pb2.AliasChange:
        """Point an alias at a version."""
        request = artifact_pb2.SetAliasRequest(ref=as_ref(ref), alias=alias)
        return (await self._endpoint.unary(self._stub.SetAlias, request)).change

    async def delete_alias(self, ref: Ref, alias: str) -> artifact_pb2.AliasChange:
        """Remove an alias of a name; its history stays."""
        target = as_ref(ref)
        request = artifact_pb2.DeleteAliasRequest(kind=target.kind, name=target.name, alias=alias)
        return (await self._endpoint.unary(self._stub.DeleteAlias, request, idempotent=False)).change

    async def alias_changes(self, ref: Ref, alias: str = "") -> list[artifact_pb2.AliasChange]:
        """Return the moves of a name's aliases, newest first."""
        target = as_ref(ref)

        async def page(token: str) -> artifact_pb2.ListAliasChangesResponse:
            request = artifact_pb2.ListAliasChangesRequest(
                kind=target.kind, name=target.name, alias=alias, page_token=token
            )
            return await self._endpoint.unary(self._stub.ListAliasChanges, request)

        return [change async for change in pages(page, lambda reply: reply.changes)]


def _empty_target(folder: Path) -> Path:
    """Return the absolute path of a folder that is new or empty; its parents exist afterwards."""
    target = folder.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        message = f"{target} exists and is not empty. Name another folder, or empty it first."
        raise LoralineApiError(grpc.StatusCode.ALREADY_EXISTS, "TARGET_EXISTS", message)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def as_ref(ref: Ref) -> artifact_pb2.ArtifactRef:
    """Return a reference given as text or as a message."""
    return parse_ref(ref) if isinstance(ref, str) else ref


class _Receiver:
    """Writes the chunks of a download and checks each file against the manifest."""

    def __init__(self, artifact: artifact_pb2.Artifact, folder: Path, progress: Progress | None):
        self._wanted = {file.path: file for file in artifact.files}
        self._total = artifact.size_bytes
        self._received = 0
        self._done: set[str] = set()
        self._name = format_ref(artifact.ref)
        self._folder = folder
        self._progress = progress
        self._path, self._hash, self._file = "", hashlib.sha256(), None
        folder.mkdir()

    def write(self, chunk: artifact_pb2.FileChunk) -> None:
        if chunk.path != self._path:
            self._finish_file()
            self._begin_file(chunk.path)
        assert self._file is not None  # noqa: S101 - _begin_file has opened it
        self._file.write(chunk.data)
        self._hash.update(chunk.data)
        self._received += len(chunk.data)
        if self._progress:
            self._progress(self._received, self._total)

    def check_complete(self) -> None:
        self._finish_file()
        missing = sorted(set(self._wanted) - self._done)
        if missing:
            raise self._loss(
                f"{missing[0]} and {len(missing) - 1} more did not arrive"
                if missing[1:]
                else f"{missing[0]} did not arrive"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin_file(self, path: str) -> None:
        pure = PurePosixPath(path)
        if path not in self._wanted or path in self._done or pure.is_absolute() or ".." in pure.parts:
            raise self._loss(f"the server sent {path!r}, which the manifest does not list")
        target = self._folder / pure
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._hash, self._file = path, hashlib.sha256(), target.open("wb")

    def _finish_file(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if self._hash.hexdigest() != self._wanted[self._path].sha256:
            raise self._loss(f"{self._path} does not match its SHA-256")
        self._done.add(self._path)

    def _loss(self, what: str) -> LoralineApiError:
        message = f"The download of {self._name} is refused: {what}. Nothing was written."
        return LoralineApiError(grpc.StatusCode.DATA_LOSS, "DOWNLOAD_MISMATCH", message)


def _files_of(folder: Path) -> tuple[list[tuple[str, Path]], tuple[str, ...]]:
    """Return the files to send by their path in the artifact, and the hidden ones that stay."""
    if folder.is_file():
        return [(folder.name, folder)], ()
    if not folder.is_dir():
        raise LoralineApiError(grpc.StatusCode.NOT_FOUND, "NO_SUCH_FOLDER", f"There is no folder or file {folder}.")
    files, skipped = [], []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden:
            skipped.append(relative.as_posix())
        elif not path.resolve().is_relative_to(folder.resolve()):
            message = f"{path} is a link that leads out of {folder}. Copy the file into the folder."
            raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "LINK_LEADS_OUT", message)
        else:
            files.append((relative.as_posix(), path))
    if not files:
        message = f"{folder} holds no files."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_FOLDER", message)
    return files, tuple(skipped)


async def _upload_parts(
    header: artifact_pb2.UploadHeader, files: list[tuple[str, Path]], progress: Progress | None
) -> AsyncIterator[artifact_pb2.UploadArtifactRequest]:
    yield artifact_pb2.UploadArtifactRequest(header=header)
    total, sent = sum(path.stat().st_size for _, path in files), 0
    for name, path in files:
        chunks = _chunks(path)
        while (data := await asyncio.to_thread(next, chunks, None)) is not None:
            yield artifact_pb2.UploadArtifactRequest(chunk=artifact_pb2.FileChunk(path=name, data=data))
            sent += len(data)
            if progress:
                progress(sent, total)


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes; an empty file gives one empty chunk, so that it exists."""
    with path.open("rb") as stream:
        data = stream.read(CHUNK_BYTES)
        yield data
        while data := stream.read(CHUNK_BYTES):
            yield data
