"""A store in a local folder: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import grpc

from loraline.core.artifacts.hashing import PIECE, VerifiedFiles, in_parallel, read_into
from loraline.core.artifacts.manifest import MANIFEST, FileEntry
from loraline.core.artifacts.store import Advance, PlannedFile, damaged, disk_errors
from loraline.core.errors import LoralineError


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """Keeps versions as plain folders under `root`; unfinished ones are in `root/.incoming`."""

    def __init__(self, root: Path):
        self._root = root.absolute()
        self._verified = VerifiedFiles()

    def location(self, prefix: str) -> str:
        """Return the version's folder."""
        return str(self._root / prefix)

    def probe(self) -> None:
        """Raise STORE_ACCESS_DENIED or DISK_FULL when nothing can be written into the folder."""
        with disk_errors(self._root):
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._root):
                    return
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                what = f"The store's folder {self._root} can't be written ({error.strerror})."
                message = f"{what} Grant the right, or set LORALINE_STORE_URL to another folder."
                raise LoralineError(grpc.StatusCode.PERMISSION_DENIED, "STORE_ACCESS_DENIED", message) from error

    def write(self, prefix: str, files: Sequence[PlannedFile], advance: Advance) -> list[FileEntry]:
        """Copy the files into the incoming folder; unchanged ones become hard links to the earlier version's."""
        incoming = self._incoming(prefix)
        with disk_errors(self._root):
            self.probe()
            incoming.mkdir(parents=True)
            for parent in sorted({(incoming / planned.path).parent for planned in files}):
                parent.mkdir(parents=True, exist_ok=True)
            return in_parallel(lambda planned: self._bring(incoming, planned, advance), files)

    def _bring(self, incoming: Path, planned: PlannedFile, advance: Advance) -> FileEntry:
        target = incoming / planned.path
        if planned.same_as is not None:
            earlier, entry = planned.same_as
            # A damaged earlier file must not live on in the new version: then the source is copied, as if new.
            if not self._verified.problem(self._root / earlier, entry):
                os.link(self._root / earlier / entry.path, target)
                return FileEntry(planned.path, entry.size, entry.sha256)
        return _copy(planned, target, advance)

    def commit(self, prefix: str, manifest: bytes) -> None:
        """Write the manifest, flush everything and rename the folder into its place."""
        incoming, final = self._incoming(prefix), self._root / prefix
        with disk_errors(self._root):
            with (incoming / MANIFEST).open("xb") as file:
                file.write(manifest)
                file.flush()
                os.fsync(file.fileno())
            for folder, _, _ in os.walk(incoming, topdown=False):
                sync_folder(Path(folder))
            final.parent.mkdir(parents=True, exist_ok=True)
            incoming.rename(final)
            for folder in (final.parent, final.parent.parent, self._root):
                sync_folder(folder)

    def discard(self, prefix: str, paths: Sequence[str] = ()) -> None:
        """Move the version out of sight in one step, then delete it."""
        for folder in (self._root / prefix, self._incoming(prefix)):
            doomed = self._root / ".incoming" / f"doomed-{uuid4().hex}"
            try:
                doomed.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(doomed)
            except FileNotFoundError:
                continue
            except OSError:  # no room even for a folder entry: delete in place, the manifest first
                (folder / MANIFEST).unlink(missing_ok=True)
                doomed = folder
            shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self, older_than_seconds: float) -> None:
        """Remove what interrupted deletions left."""
        for doomed in (self._root / ".incoming").glob("doomed-*"):
            with contextlib.suppress(FileNotFoundError):
                if doomed.stat().st_ctime < time.time() - older_than_seconds:
                    shutil.rmtree(doomed, ignore_errors=True)

    def read_manifest(self, prefix: str) -> bytes | None:
        """Return the manifest's content, or None."""
        try:
            return (self._root / prefix / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def present(self, prefix: str, files: Sequence[FileEntry]) -> bool:
        """Tell whether manifest and files are there and intact."""
        return self.read_manifest(prefix) is not None and not self._verified.check(self._root / prefix, files)

    def stream(self, prefix: str, entry: FileEntry) -> Iterator[bytes]:
        """Read a file in pieces of 1 MiB, and compare its hash at the end."""
        hasher, size = hashlib.sha256(), 0
        try:
            with (self._root / prefix / entry.path).open("rb") as file:
                while piece := file.read(PIECE):
                    hasher.update(piece)
                    size += len(piece)
                    yield piece
        except OSError as error:
            raise damaged(self.location(prefix), {entry.path: f"can't be read ({error.strerror})"}) from error
        if size != entry.size or hasher.hexdigest() != entry.sha256:
            problem = f"has {size} bytes instead of {entry.size}" if size != entry.size else "has another SHA-256"
            raise damaged(self.location(prefix), {entry.path: problem})

    def check(self, prefix: str, files: Sequence[FileEntry]) -> dict[str, str]:
        """Hash all of the files again."""
        return self._verified.check(self._root / prefix, files, force=True)

    def fetch(self, prefix: str, files: Sequence[FileEntry], cache: Path) -> Path:
        """Return the store's own folder; files not changed since they were last hashed are not hashed again."""
        folder = self._root / prefix
        problems = self._verified.check(folder, files)
        if problems:
            raise damaged(str(folder), problems)
        return folder

    def _incoming(self, prefix: str) -> Path:
        return self._root / ".incoming" / prefix.replace("/", "+")


def _copy(planned: PlannedFile, target: Path, advance: Advance) -> FileEntry:
    """Copy with one reading, hash on the way unless that was done, flush to the disk."""
    hasher = planned.hasher()
    source = os.open(planned.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with target.open("xb", buffering=0) as file:

            def each(piece: memoryview) -> None:
                rest = piece
                while rest:
                    rest = rest[file.write(rest) :]
                advance(len(piece))

            size = read_into(source, hasher, each)
            os.fsync(file.fileno())
        planned.check_unchanged(source, size)
    finally:
        os.close(source)
    return FileEntry(planned.path, size, hasher.hexdigest())
