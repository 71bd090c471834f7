"""A store in an S3 bucket, through the minio client."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from minio import Minio
from minio.commonconfig import CopySource
from minio.deleteobjects import DeleteObject
from minio.error import MinioException

from loraline.core.artifacts.hashing import PIECE, VerifiedFiles
from loraline.core.artifacts.manifest import MANIFEST, FileEntry
from loraline.core.artifacts.s3_client import CONCURRENCY, ensure_bucket, is_missing, open_client, s3_errors
from loraline.core.artifacts.s3_transfer import PART_SIZE, Buffers, Transfer
from loraline.core.artifacts.store import Advance, PlannedFile, damaged, disk_errors
from loraline.core.config import CoreSettings
from loraline.core.errors import unavailable

T = TypeVar("T")
R = TypeVar("R")


def open_s3(settings: CoreSettings, bucket: str, prefix: str) -> S3Store:
    """Return the store of a bucket and an optional prefix in it; nothing is contacted yet."""
    return S3Store(open_client(settings), bucket, prefix, region=settings.s3_region)


class S3Store:
    """Keeps versions as objects under `prefix`; memory is at most part size (bytes) times concurrency."""

    def __init__(
        self,
        client: Minio,
        bucket: str,
        prefix: str = "",
        *,
        region: str = "us-east-1",
        part_size: int = PART_SIZE,
        concurrency: int = CONCURRENCY,
    ):
        self._client, self._bucket, self._region = client, bucket, region
        self._root = f"{prefix}/" if prefix else ""
        self._concurrency = concurrency
        self._buffers = Buffers(concurrency, part_size)
        self._verified = VerifiedFiles()
        self._bucket_known = False

    def location(self, prefix: str) -> str:
        """Return the version's s3:// address."""
        return f"s3://{self._bucket}/{self._root}{prefix}"

    def probe(self) -> None:
        """Raise STORE_UNREACHABLE or STORE_ACCESS_DENIED when the bucket can't be used now."""
        with s3_errors(self.location("").rstrip("/")):
            ensure_bucket(self._client, self._bucket, self._region)
        self._bucket_known = True

    def write(self, prefix: str, files: Sequence[PlannedFile], advance: Advance) -> list[FileEntry]:
        """Send the files; unchanged ones are copied by the server itself."""
        with self._using(prefix), self._transfer(advance) as transfer:

            def bring(planned: PlannedFile) -> FileEntry:
                key = self._key(prefix, planned.path)
                if planned.same_as is not None and self._copied(key, *planned.same_as):
                    return FileEntry(planned.path, planned.same_as[1].size, planned.same_as[1].sha256)
                return transfer.upload(key, planned)

            return self._each(transfer, bring, files)

    def _copied(self, key: str, earlier: str, entry: FileEntry) -> bool:
        try:
            self._client.copy_object(self._bucket, key, CopySource(self._bucket, self._key(earlier, entry.path)))
        except MinioException as error:
            if is_missing(error):
                return False
            raise
        # A source object that was cut short must not live on in the new version.
        return self._client.stat_object(self._bucket, key).size == entry.size

    def commit(self, prefix: str, manifest: bytes) -> None:
        """Write the manifest."""
        with self._using(prefix):
            key = self._key(prefix, MANIFEST)
            self._client.put_object(self._bucket, key, io.BytesIO(manifest), len(manifest), "application/json")

    def discard(self, prefix: str, paths: Sequence[str] = ()) -> None:
        """Delete the manifest, then every unfinished upload of these paths and every object of the version."""
        with self._using(prefix):
            self._client.remove_object(self._bucket, self._key(prefix, MANIFEST))
            for path in paths:
                self._abort_uploads(self._key(prefix, path))
            found = self._client.list_objects(self._bucket, prefix=self._key(prefix, ""), recursive=True)
            doomed = [DeleteObject(item.object_name) for item in found if item.object_name]
            for failure in self._client.remove_objects(self._bucket, doomed):
                message = f"{self.location(prefix)}: {failure.name} can't be deleted ({failure.message}). Try again."
                raise unavailable("STORE_FAILED", message, location=self.location(prefix))

    def _abort_uploads(self, key: str) -> None:
        # MinIO and others list unfinished uploads of one exact key only, not of all keys that begin so.
        try:
            found = self._client._list_multipart_uploads(self._bucket, prefix=key).uploads
        except MinioException as error:
            if is_missing(error):
                return
            raise
        for item in found:
            if item.object_name == key and item.upload_id:
                self._client._abort_multipart_upload(self._bucket, key, item.upload_id)

    def sweep(self, older_than_seconds: float) -> None:
        """Do nothing: all that can be left behind lies under a version, where discard finds it."""

    def read_manifest(self, prefix: str) -> bytes | None:
        """Return the manifest's content, or None."""
        with self._using(prefix):
            try:
                response = self._client.get_object(self._bucket, self._key(prefix, MANIFEST))
            except MinioException as error:
                if is_missing(error):
                    return None
                raise
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()

    def present(self, prefix: str, files: Sequence[FileEntry]) -> bool:
        """Tell whether all files are there with their sizes, from a listing."""
        with self._using(prefix):
            under = self._key(prefix, "")
            found = self._client.list_objects(self._bucket, prefix=under, recursive=True)
            sizes = {item.object_name: item.size for item in found}
        wanted = {under + entry.path: entry.size for entry in files}
        return under + MANIFEST in sizes and all(sizes.get(key) == size for key, size in wanted.items())

    def stream(self, prefix: str, entry: FileEntry) -> Iterator[bytes]:
        """Read an object in pieces of 1 MiB, and compare its hash at the end."""
        hasher, size = hashlib.sha256(), 0
        with self._using(prefix):
            try:
                response = self._client.get_object(self._bucket, self._key(prefix, entry.path))
            except MinioException as error:
                if is_missing(error):
                    raise damaged(self.location(prefix), {entry.path: "is missing"}) from error
                raise
            try:
                for piece in response.stream(PIECE):
                    hasher.update(piece)
                    size += len(piece)
                    yield piece
            finally:
                response.close()
                response.release_conn()
        if size != entry.size or hasher.hexdigest() != entry.sha256:
            problem = f"has {size} bytes instead of {entry.size}" if size != entry.size else "has another SHA-256"
            raise damaged(self.location(prefix), {entry.path: problem})

    def check(self, prefix: str, files: Sequence[FileEntry]) -> dict[str, str]:
        """Read all objects and compare; nothing is kept."""
        with self._using(prefix), self._transfer(lambda _: None) as transfer:
            found = self._each(transfer, lambda entry: self._read(transfer, prefix, entry, None), files)
        return {entry.path: problem for entry, problem in zip(files, found, strict=True) if problem}

    def fetch(self, prefix: str, files: Sequence[FileEntry], cache: Path) -> Path:
        """Bring the files into the cache folder; those found intact there are not read again."""
        wanted = [entry for entry in files if self._verified.problem(cache, entry)]
        if not wanted:
            return cache
        with self._using(prefix), disk_errors(cache), self._transfer(lambda _: None) as transfer:
            for parent in sorted({(cache / entry.path).parent for entry in wanted}):
                parent.mkdir(parents=True, exist_ok=True)
            found = self._each(transfer, lambda entry: self._bring(transfer, prefix, entry, cache), wanted)
        problems = {entry.path: problem for entry, problem in zip(wanted, found, strict=True) if problem}
        if problems:
            raise damaged(self.location(prefix), problems)
        return cache

    def _bring(self, transfer: Transfer, prefix: str, entry: FileEntry, cache: Path) -> str:
        """Download beside, and rename only what is intact: several processes may fetch the same file at once."""
        target = cache / entry.path
        partial = target.with_name(f".{uuid4().hex}.partial")
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            problem = self._read(transfer, prefix, entry, descriptor)
            if not problem:
                partial.rename(target)
                self._verified.intact(target, entry.sha256)
            return problem
        finally:
            os.close(descriptor)
            partial.unlink(missing_ok=True)

    def _read(self, transfer: Transfer, prefix: str, entry: FileEntry, descriptor: int | None) -> str:
        key = self._key(prefix, entry.path)
        try:
            size = self._client.stat_object(self._bucket, key).size
            if size != entry.size:
                return f"has {size} bytes instead of {entry.size}"
            actual = transfer.download(key, entry, descriptor)
        except MinioException as error:
            if is_missing(error):
                return "is missing"
            raise
        return "" if actual == entry.sha256 else f"has SHA-256 {actual[:12]}… instead of {entry.sha256[:12]}…"

    def _key(self, prefix: str, path: str) -> str:
        return f"{self._root}{prefix}/{path}"

    @contextmanager
    def _using(self, prefix: str) -> Iterator[None]:
        if not self._bucket_known:
            self.probe()
        with s3_errors(self.location(prefix)):
            yield

    @contextmanager
    def _transfer(self, advance: Advance) -> Iterator[Transfer]:
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="s3-part") as pool:
            yield Transfer(self._client, self._bucket, self._buffers, pool, advance, threading.Event())

    def _each(self, transfer: Transfer, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Call the function on every file, several at once. A failure stops the others, and is what is raised."""

        def call(item: T) -> R:
            try:
                return function(item)
            except BaseException:
                transfer.stopped.set()
                raise

        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="s3-file") as pool:
            futures = [pool.submit(call, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException as error:
                transfer.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                causes = [cause for future in futures if not future.cancelled() and (cause := future.exception())]
                # Files that were stopped say so only; the file that failed says why.
                raise next((cause for cause in causes if not isinstance(cause, InterruptedError)), error) from None
