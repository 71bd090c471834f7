"""How a folder becomes an artifact: compare, allot a version, write the bytes, the manifest last, then be ready."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.artifacts import catalog
from loraline.core.artifacts.hashing import in_parallel, sha256_file
from loraline.core.artifacts.manifest import FileEntry, Manifest, digest_of, scan_folder
from loraline.core.artifacts.refs import prefix_of
from loraline.core.artifacts.store import BlobStore, PlannedFile, mark_of
from loraline.core.db.database import Database

HEARTBEAT_SECONDS = 15.0


@dataclass
class Publication:
    """One call of `ArtifactLibrary.publish`."""

    database: Database
    store: BlobStore
    kind: int
    name: str
    folder: Path
    inputs: list[ArtifactRef]
    settings: dict[str, Any]
    facts: dict[str, Any]
    library_versions: dict[str, str]
    job: str
    guard: Callable[[Connection], None] | None
    progress: Callable[[int, int], None] | None
    writer: str = field(default_factory=lambda: uuid4().hex)
    total: int = 0
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> tuple[Manifest, bool]:
        """Publish; return the manifest, and True when equal content was there already and nothing was stored."""
        found = scan_folder(self.folder)
        self.total = sum(size for _, _, size in found)
        with self.database.read() as connection:
            previous = catalog.latest(connection, self.kind, self.name)
        planned = self._plan(found, previous)
        if previous is not None and previous.manifest is not None and self._is_there(planned, previous.manifest):
            self._guard_alone()
            return previous.manifest, True
        return self._store(planned), False

    def _plan(self, found: list[tuple[str, Path, int]], previous: catalog.Version | None) -> list[PlannedFile]:
        """Find the files that the previous version has already; only those of a size it knows are hashed for it."""
        if previous is None or previous.manifest is None:
            return [PlannedFile(*item) for item in found]
        prefix = prefix_of(previous.kind, previous.name, previous.version)
        known = {entry.sha256: entry for entry in previous.manifest.files}
        sizes = {entry.size for entry in previous.manifest.files}

        def plan(item: tuple[str, Path, int]) -> PlannedFile:
            path, source, size = item
            if size not in sizes:
                return PlannedFile(path, source, size)
            mark = mark_of(source.stat())
            digest, _ = sha256_file(source)
            entry = known.get(digest)
            if entry is None or entry.size != size:
                return PlannedFile(path, source, size, known=(mark, digest))
            self._advance(size)
            return PlannedFile(path, source, size, (prefix, entry))

        return in_parallel(plan, found)

    def _is_there(self, planned: list[PlannedFile], previous: Manifest) -> bool:
        """Tell whether the previous version is equal and not visibly damaged; a damaged one gets a successor."""
        if any(item.same_as is None for item in planned):
            return False
        same = [FileEntry(p.path, p.size, p.same_as[1].sha256) for p in planned if p.same_as is not None]
        prefix = prefix_of(previous.kind, previous.name, previous.version)
        return digest_of(same) == previous.digest and self.store.present(prefix, previous.files)

    def _store(self, planned: list[PlannedFile]) -> Manifest:
        with self.database.begin() as connection:
            self._check(connection)
            given_up = catalog.supersede(connection, self.kind, self.name, self.job)
            paths = [item.path for item in planned]
            version = catalog.allot(connection, self.kind, self.name, job=self.job, writer=self.writer, paths=paths)
        prefix = prefix_of(self.kind, self.name, version)
        try:
            for item in given_up:
                self._remove(item.version, item.paths, give_back=False)
            with self._heartbeat(version):
                files = self.store.write(prefix, planned, self._advance)
                manifest = self._manifest(version, files)
                self.store.commit(prefix, manifest.to_bytes())
            with self.database.begin() as connection:
                self._check(connection)
                catalog.finish(connection, manifest, self.writer)
        except BaseException:
            # Whatever can't be removed now stays a pending row, which collect_garbage finds.
            with contextlib.suppress(Exception):
                self._remove(version, (), give_back=True)
            raise
        return manifest

    def _manifest(self, version: int, files: list[FileEntry]) -> Manifest:
        return Manifest(
            kind=self.kind,
            name=self.name,
            version=version,
            files=files,
            create_time=round(time.time(), 6),
            job=self.job,
            inputs=self.inputs,
            settings=self.settings,
            facts=self.facts,
            library_versions=self.library_versions,
        )

    def _remove(self, version: int, paths: Sequence[str], *, give_back: bool) -> None:
        self.store.discard(prefix_of(self.kind, self.name, version), paths)
        with self.database.begin() as connection:
            catalog.drop(connection, self.kind, self.name, version, give_back=give_back)

    def _check(self, connection: Connection) -> None:
        if self.guard is not None:
            self.guard(connection)

    def _guard_alone(self) -> None:
        if self.guard is not None:
            with self.database.begin() as connection:
                self.guard(connection)

    def _advance(self, count: int) -> None:
        if self.progress is not None:
            with self._lock:
                self.done = min(self.total, self.done + count)
                self.progress(self.done, self.total)

    @contextlib.contextmanager
    def _heartbeat(self, version: int) -> Iterator[None]:
        """Show that this writer is alive, however long a file takes, so that nobody takes its files for garbage."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                # A missed beat is no harm: the next comes long before anyone calls the writer dead.
                with contextlib.suppress(Exception), self.database.begin() as connection:
                    catalog.touch(connection, self.kind, self.name, version, self.writer)

        thread = threading.Thread(target=beat, name="publish-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
