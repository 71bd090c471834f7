"""Moves files to and from S3 in parts, several at once, in memory of at most part size times concurrency."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap

import urllib3
from minio import Minio
from minio.datatypes import Part

from loraline.core.artifacts.manifest import FileEntry
from loraline.core.artifacts.store import Advance, PlannedFile, source_changed
from loraline.core.errors import invalid_argument

PART_SIZE = 8 * 1024 * 1024
_MAX_PARTS, _MAX_OBJECT = 10_000, 5 * 1024**4  # S3's own limits: parts and bytes of one object
_TRIES = 3
_PIECE = 256 * 1024


class Buffers:
    """A bounded set of buffers of one part each; they are freed when none is in use.

    They are mapped, not allocated: the allocator would keep what is freed, and hand out other memory the next time.
    """

    def __init__(self, count: int, size: int):
        self.size = size
        self._free: list[mmap] = []
        self._used = 0
        self._count = count
        self._changed = threading.Condition()

    def take(self, size: int = 0) -> mmap:
        """Wait for a buffer; `size` is for files so large that parts of the usual size would be too many."""
        with self._changed:
            self._changed.wait_for(lambda: self._used < self._count)
            self._used += 1
            if size > self.size:
                return mmap(-1, size)
            return self._free.pop() if self._free else mmap(-1, self.size)

    def give(self, buffer: mmap) -> None:
        """Return a buffer."""
        with self._changed:
            self._used -= 1
            if len(buffer) == self.size:
                self._free.append(buffer)
            if self._used == 0:
                self._free.clear()
            self._changed.notify()


@dataclass
class Transfer:
    """One operation on a bucket; its parts share the buffers and the threads."""

    client: Minio
    bucket: str
    buffers: Buffers
    pool: ThreadPoolExecutor
    advance: Advance
    stopped: threading.Event

    def upload(self, key: str, planned: PlannedFile) -> FileEntry:
        """Send a file, reading it once: each part is hashed while the parts before it are on their way."""
        if planned.size > _MAX_OBJECT:
            message = f"{planned.path} is larger than 5 TiB, the most that S3 takes. Split it."
            raise invalid_argument("FILE_TOO_LARGE", message, path=planned.path)
        source = os.open(planned.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if planned.size <= self.buffers.size:
                return self._upload_whole(key, planned, source)
            return self._upload_parts(key, planned, source)
        finally:
            os.close(source)

    def _upload_whole(self, key: str, planned: PlannedFile, source: int) -> FileEntry:
        buffer = self.buffers.take()
        try:
            data = _fill(source, buffer)
            if len(data) != planned.size or os.read(source, 1):
                raise source_changed(planned.path)
            planned.check_unchanged(source, len(data))
            hasher = planned.hasher()
            hasher.update(data)
            self._check_going_on()
            self.client._put_object(self.bucket, key, data, headers={})  # type: ignore[arg-type]
            self.advance(len(data))
            return FileEntry(planned.path, len(data), hasher.hexdigest())
        finally:
            self.buffers.give(buffer)

    def _upload_parts(self, key: str, planned: PlannedFile, source: int) -> FileEntry:
        upload = self.client._create_multipart_upload(self.bucket, key, {})
        sent: list[Future[Part]] = []
        hasher, total = planned.hasher(), 0
        part_size = -(-planned.size // _MAX_PARTS)
        try:
            while True:
                self._check_going_on()
                buffer = self.buffers.take(part_size)
                data = _fill(source, buffer)
                if not data:
                    self.buffers.give(buffer)
                    break
                # Hashed before it is handed over: once sent, the buffer belongs to whoever takes it next.
                hasher.update(data)
                total += len(data)
                sent.append(self.pool.submit(self._send_part, key, upload, len(sent) + 1, buffer, data))
                for done in sent:
                    if done.done():
                        done.result()
            parts = [future.result() for future in sent]
            planned.check_unchanged(source, total)
            self.client._complete_multipart_upload(self.bucket, key, upload, parts)
        except BaseException:
            # Not cancelled but told to stop: each must still return its buffer.
            self.stopped.set()
            wait(sent)
            self._abort(key, upload)
            raise
        return FileEntry(planned.path, total, hasher.hexdigest())

    def _send_part(self, key: str, upload: str, number: int, buffer: mmap, data: memoryview) -> Part:
        try:
            self._check_going_on()
            etag = self.client._upload_part(self.bucket, key, data, {}, upload, number)  # type: ignore[arg-type]
            self.advance(len(data))
            return Part(number, etag)
        finally:
            self.buffers.give(buffer)

    def _abort(self, key: str, upload: str) -> None:
        # An abort that fails as well is left to discard(), which lists what is unfinished.
        with suppress(Exception):
            self.client._abort_multipart_upload(self.bucket, key, upload)

    def download(self, key: str, entry: FileEntry, target: int | None) -> str:
        """Read an object in ranges and write them to the descriptor, if any; return the SHA-256 of what was read."""
        step = self.buffers.size
        ranges = [(start, min(step, entry.size - start)) for start in range(0, entry.size, step)]
        ordered = _OrderedHash(self.buffers)
        if len(ranges) < 2:
            for start, length in ranges:
                self._read_range(key, start, length, target, ordered, self.buffers.take())
            return ordered.hexdigest()
        running: list[Future[None]] = []
        try:
            for start, length in ranges:
                self._check_going_on()
                # Buffers are taken in order, so that the range that the hash waits for always has one.
                buffer = self.buffers.take()
                running.append(self.pool.submit(self._read_range, key, start, length, target, ordered, buffer))
                for done in running:
                    if done.done():
                        done.result()
            for future in running:
                future.result()
        finally:
            ordered.stop()
            wait(running)
            ordered.release()
        return ordered.hexdigest()

    def _read_range(
        self, key: str, start: int, length: int, target: int | None, ordered: _OrderedHash, buffer: mmap
    ) -> None:
        try:
            self._check_going_on()
            data = memoryview(buffer)[:length]
            self._receive(key, start, data, target)
            self.advance(length)
        except BaseException:
            self.buffers.give(buffer)
            raise
        ordered.add(start, buffer, length)

    def _receive(self, key: str, start: int, data: memoryview, target: int | None) -> None:
        """Fill `data` from the object, and the target; a connection that breaks is tried again from where it broke."""
        done, tries = 0, 0
        while done < len(data):
            try:
                response = self.client.get_object(self.bucket, key, offset=start + done, length=len(data) - done)
                try:
                    # In small pieces, so that each is still in the processor's cache when it is written.
                    while count := response.readinto(data[done : done + _PIECE]):  # type: ignore[arg-type]
                        if target is not None:
                            _write_at(target, data[done : done + count], start + done)
                        done += count
                finally:
                    response.close()
                    response.release_conn()
                if done < len(data):
                    raise urllib3.exceptions.ProtocolError(f"{len(data) - done} bytes are missing")
            except urllib3.exceptions.HTTPError:
                tries += 1
                if tries == _TRIES:
                    raise

    def _check_going_on(self) -> None:
        if self.stopped.is_set():
            raise InterruptedError("another file of the same operation failed")


class _OrderedHash:
    """Hashes parts in the order of the file while they arrive in any."""

    def __init__(self, buffers: Buffers):
        self._hash = hashlib.sha256()
        self._buffers = buffers
        self._next = 0
        self._waiting: dict[int, tuple[mmap, int]] = {}
        self._lock = threading.Lock()
        self._busy = self._stopped = False

    def add(self, start: int, buffer: mmap, length: int) -> None:
        """Take a part; whoever brings the part that is next hashes it and those that wait behind it."""
        with self._lock:
            self._waiting[start] = (buffer, length)
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                part = None if self._stopped else self._waiting.pop(self._next, None)
                if part is None:
                    self._busy = False
                    return
            self._hash.update(memoryview(part[0])[: part[1]])
            self._next += part[1]
            self._buffers.give(part[0])

    def stop(self) -> None:
        """Let no further part wait once an operation has failed; a no-op after the last part."""
        with self._lock:
            self._stopped = bool(self._waiting)

    def release(self) -> None:
        """Return the buffers of parts that were never hashed."""
        for buffer, _ in self._waiting.values():
            self._buffers.give(buffer)
        self._waiting.clear()

    def hexdigest(self) -> str:
        """Return the hash of what came so far."""
        return self._hash.hexdigest()


def _fill(source: int, buffer: mmap) -> memoryview:
    view, done = memoryview(buffer), 0
    while done < len(view) and (count := os.readv(source, [view[done:]])):
        done += count
    return view[:done]


def _write_at(target: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(target, data, start)
        data, start = data[count:], start + count
