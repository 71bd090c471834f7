"""An upload in progress: chunks become files in a folder of their own, which is then published."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from loraline.api.artifact.v1.artifact_pb2 import UploadHeader
from loraline.core.artifacts.content import check_content
from loraline.core.artifacts.manifest import check_path
from loraline.core.artifacts.refs import check_kind, check_name
from loraline.core.artifacts.store import disk_errors
from loraline.core.errors import invalid_argument

if TYPE_CHECKING:
    from loraline.core.artifacts.library import ArtifactLibrary, Published


def sweep_uploads(parent: Path, older_than_seconds: float) -> None:
    """Remove what uploads of servers that died left behind."""
    for folder in parent.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
            if newest < time.time() - older_than_seconds:
                shutil.rmtree(folder, ignore_errors=True)


class Upload:
    """Collects one upload under `parent`; call `discard` in any case."""

    def __init__(self, parent: Path, header: UploadHeader):
        self._kind, self._name = check_kind(header.kind), check_name(header.name)
        self._facts = MessageToDict(header.facts)
        self._parent = parent
        with disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(dir=parent))
        self._seen: set[str] = set()
        self._path = ""
        self._file: FileIO | None = None
        self._discarded = False
        self._lock = threading.Lock()  # a call that is cancelled discards while its last chunk is still being written

    def add(self, path: str, data: bytes) -> None:
        """Append to a file; another path than before ends the file before and begins a new one."""
        with self._lock, disk_errors(self._parent):
            if self._discarded:
                return
            if path != self._path or self._file is None:
                self._open(path)
            assert self._file is not None, "opened above"  # noqa: S101
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def _open(self, path: str) -> None:
        target = self._folder / check_path(path)
        self._close()
        if path in self._seen:
            message = f"Chunks of {path!r} do not follow one another. Send each file in one go."
            raise invalid_argument("UPLOAD_OUT_OF_ORDER", message, chunk__path=message)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = target.open("xb", buffering=0)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            message = f"{path!r} is both a file and a folder, or another file but for letter case. Rename one."
            raise invalid_argument("PATH_CONFLICT", message, chunk__path=message) from error
        self._seen.add(path)
        self._path = path

    def publish(self, library: ArtifactLibrary) -> Published:
        """Publish what was collected; INVALID_ARGUMENT when that is not of the kind."""
        self._close()
        if self._seen:
            check_content(self._kind, self._folder)
        return library.publish_folder(self._kind, self._name, self._folder, facts=self._facts)

    def discard(self) -> None:
        """Delete the folder."""
        with self._lock:
            self._discarded = True
            self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
