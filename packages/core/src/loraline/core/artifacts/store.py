"""The port between the library and a place that keeps bytes: a local folder or S3."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraline.core.artifacts.manifest import FileEntry
from loraline.core.errors import LoralineError, data_loss, failed_precondition, resource_exhausted

Advance = Callable[[int], None]
"""Called with a number of bytes that were just moved or read; from any thread."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written into a new version."""

    path: str
    source: Path
    size: int
    same_as: tuple[str, FileEntry] | None = None
    """Prefix and entry of an earlier version's file with the same content, which may be copied inside the store."""
    known: tuple[FileMark, str] | None = None
    """The file's mark before it was hashed, and the SHA-256 found: while the mark holds, nobody hashes it again."""

    def hasher(self) -> Hasher:
        """Return what takes the file's bytes and gives their SHA-256 in hex."""
        return hashlib.sha256() if self.known is None else _Known(self.known[1])

    def check_unchanged(self, descriptor: int, size: int) -> None:
        """Raise SOURCE_CHANGED when the open file, of which so many bytes were read, is not the one of the plan."""
        if size != self.size or (self.known is not None and mark_of(os.fstat(descriptor)) != self.known[0]):
            raise source_changed(self.path)


class Hasher(Protocol):
    """What hashlib's objects can do, as far as it is used here."""

    def update(self, data: memoryview, /) -> None:
        """Take bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the SHA-256 of all bytes so far, in hex."""
        ...


class _Known:
    """A hash that was taken before."""

    def __init__(self, digest: str):
        self._digest = digest

    def update(self, data: memoryview, /) -> None:
        """Leave the bytes alone."""

    def hexdigest(self) -> str:
        """Return what was found then."""
        return self._digest


FileMark = tuple[int, int, int]


def mark_of(status: os.stat_result) -> FileMark:
    """Return what changes with a file's content: size, time of change and inode."""
    return status.st_size, status.st_mtime_ns, status.st_ino


class BlobStore(Protocol):
    """Keeps versions under prefixes such as `adapters/mareva/v3`. All methods block and may be called from any thread.

    A version becomes visible with `commit` alone, which writes the manifest last.
    """

    def location(self, prefix: str) -> str:
        """Return the address of a version, for people."""
        ...

    def probe(self) -> None:
        """Raise a typed error when the store can't be used now; creates the folder or bucket when it is missing."""
        ...

    def write(self, prefix: str, files: Sequence[PlannedFile], advance: Advance) -> list[FileEntry]:
        """Bring all files into the store, not yet visible; hashes are of the bytes as they were stored."""
        ...

    def commit(self, prefix: str, manifest: bytes) -> None:
        """Make what was written visible by writing its manifest."""
        ...

    def discard(self, prefix: str, paths: Sequence[str] = ()) -> None:
        """Remove a version, finished or not, manifest first; nothing there is no error.

        `paths` are files that a writer that died may have been sending.
        """
        ...

    def sweep(self, older_than_seconds: float) -> None:
        """Remove leftovers of interrupted deletions that are older than so many seconds."""
        ...

    def read_manifest(self, prefix: str) -> bytes | None:
        """Return the manifest's content, or None when there is none."""
        ...

    def present(self, prefix: str, files: Sequence[FileEntry]) -> bool:
        """Tell, moving no bytes, whether manifest and files seem to be there."""
        ...

    def stream(self, prefix: str, entry: FileEntry) -> Iterator[bytes]:
        """Read a file in pieces of at most 1 MiB; DATA_LOSS at the latest after the last when it is not as it was."""
        ...

    def check(self, prefix: str, files: Sequence[FileEntry]) -> dict[str, str]:
        """Read all of the files; return path -> what is wrong for those that differ."""
        ...

    def fetch(self, prefix: str, files: Sequence[FileEntry], cache: Path) -> Path:
        """Return a local folder that holds these files, verified; `cache` is a folder for copies if any are needed."""
        ...


def damaged(location: str, problems: Mapping[str, str]) -> LoralineError:
    """DATA_LOSS for files that are not what the manifest says; names each (the first ten)."""
    shown = "; ".join(f"{path}: {problem}" for path, problem in sorted(problems.items())[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return data_loss(
        "ARTIFACT_DAMAGED",
        f"{location} is damaged: {shown}{more}. Delete this version and publish it again, or restore it from a backup.",
        files=", ".join(sorted(problems)[:100]),
        location=location,
    )


def source_changed(path: str) -> LoralineError:
    """FAILED_PRECONDITION for a file that was written to while it was being published."""
    return failed_precondition(
        "SOURCE_CHANGED", f"{path} changed while it was published. Publish again when nothing writes to it.", path=path
    )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a spent quota into RESOURCE_EXHAUSTED that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise resource_exhausted(
            "DISK_FULL", f"The disk of {folder} is full. Free some space there and try again.", folder=str(folder)
        ) from error
