"""The library of artifacts: versions and aliases in the database, bytes in a store."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection

from loraline.api.artifact.v1.artifact_pb2 import AliasChange, Artifact, ArtifactRef
from loraline.core import tracing
from loraline.core.artifacts import aliases, catalog
from loraline.core.artifacts.local import LocalStore
from loraline.core.artifacts.manifest import FileEntry, Manifest, plain
from loraline.core.artifacts.publishing import Publication
from loraline.core.artifacts.refs import check_kind, check_name, check_new_alias, check_ref, format_ref, prefix_of
from loraline.core.artifacts.store import BlobStore, damaged
from loraline.core.artifacts.uploads import sweep_uploads
from loraline.core.artifacts.uses import check_unused
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.errors import LoralineError, invalid_argument, not_found

Observer = Callable[[str, float, int], None]
"""Told of each finished publish, publish_unchanged, fetch, verify and verify_failure: event, seconds, bytes."""


def open_store(settings: CoreSettings) -> BlobStore:
    """Return the store that the settings name; INVALID_ARGUMENT for an address of another kind."""
    parts = urlsplit(settings.store_url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        try:
            from loraline.core.artifacts.s3 import open_s3
        except ModuleNotFoundError as error:
            message = "An s3:// store needs its client: install loraline-core[s3]."
            raise invalid_argument("STORE_DRIVER_MISSING", message, store_url=message) from error
        return open_s3(settings, bucket=parts.netloc, prefix=parts.path.strip("/"))
    message = "Set LORALINE_STORE_URL to file:///folder or s3://bucket/optional/prefix."
    raise invalid_argument("STORE_URL_INVALID", f"{settings.store_url!r} is no store. {message}", store_url=message)


@dataclass(frozen=True)
class Published:
    """What a publish call gave: the artifact, and whether equal content was there already."""

    artifact: Artifact
    unchanged: bool


class ArtifactLibrary:
    """Publishes, finds, fetches and checks artifacts. All methods block and may be called from any thread."""

    def __init__(self, store: BlobStore, database: Database, cache: Path, observer: Observer | None = None):
        self.store = store
        self.database = database
        self.observer = observer
        self._cache = cache
        self.upload_dir = cache.parent / "uploads"
        """Folder where uploads are collected before they are published."""

    @classmethod
    def open(cls, settings: CoreSettings, database: Database) -> ArtifactLibrary:
        """Open the library of these settings; the database must have been migrated."""
        return cls(open_store(settings), database, settings.data_dir / "cache")

    @tracing.traced("artifact publish")
    def publish(
        self,
        kind: int,
        name: str,
        folder: Path,
        *,
        inputs: Sequence[ArtifactRef] = (),
        settings: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        library_versions: Mapping[str, str] | None = None,
        job: str = "",
        guard: Callable[[Connection], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Artifact:
        """Publish a folder's files as the next version; content equal to the latest version gives that one back.

        `guard` runs inside the transaction that allots the version and the one that makes it ready; when it raises,
        nothing becomes visible. `progress` is told bytes done and bytes in all.
        """
        return self.publish_folder(
            kind, name, folder, inputs=inputs, settings=settings, facts=facts, library_versions=library_versions,
            job=job, guard=guard, progress=progress,
        ).artifact  # fmt: skip

    def publish_folder(
        self,
        kind: int,
        name: str,
        folder: Path,
        *,
        inputs: Sequence[ArtifactRef] = (),
        settings: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        library_versions: Mapping[str, str] | None = None,
        job: str = "",
        guard: Callable[[Connection], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Published:
        """Do what `publish` does, and tell whether the content was there already."""
        start = time.monotonic()
        manifest, unchanged = Publication(
            database=self.database,
            store=self.store,
            kind=check_kind(kind),
            name=check_name(name),
            folder=Path(folder),
            inputs=[self.resolve(ref) for ref in inputs],
            settings=plain(settings or {}),
            facts=plain(facts or {}),
            library_versions={str(key): str(value) for key, value in (library_versions or {}).items()},
            job=job,
            guard=guard,
            progress=progress,
        ).run()
        self._observe("publish_unchanged" if unchanged else "publish", start, manifest.size_bytes)
        return Published(self._artifact(manifest), unchanged)

    def resolve(self, ref: ArtifactRef) -> ArtifactRef:
        """Return the exact reference: kind, name, version and digest. NOT_FOUND names what exists."""
        manifest = self._find(ref)
        return ArtifactRef(kind=ref.kind, name=ref.name, version=manifest.version, digest=manifest.digest)

    def get(self, ref: ArtifactRef) -> Artifact:
        """Return an artifact with its files."""
        return self._artifact(self._find(ref))

    def list(
        self, *, kind: int = 0, name: str = "", page_size: int = 50, page_token: str = ""
    ) -> tuple[builtins.list[Artifact], str]:
        """Return a page of artifacts without their files, newest first, and the token of the next page."""
        with self.database.read() as connection:
            size = catalog.check_page_size(page_size)
            versions, token = catalog.page(connection, kind, name, size, page_token)
            pointing = catalog.aliases_of(connection, versions)
        found = [
            version.manifest.to_artifact(
                aliases=pointing[version.id],
                location=self.store.location(prefix_of(version.kind, version.name, version.version)),
                with_files=False,
            )
            for version in versions
            if version.manifest is not None
        ]
        return found, token

    @tracing.traced("artifact fetch")
    def fetch(self, ref: ArtifactRef, *, paths: Sequence[str] = ()) -> Path:
        """Return a local folder with the artifact's files, or those of `paths`, each verified. Never write into it.

        DATA_LOSS names the files that are not what the manifest says.
        """
        start = time.monotonic()
        manifest = self._find(ref)
        files = self._chosen(manifest, paths)
        self._check_manifest(manifest)
        folder = f"{_prefix(manifest)}-{manifest.digest.removeprefix('sha256:')[:12]}"
        try:
            local = self.store.fetch(_prefix(manifest), files, self._cache / folder)
        except LoralineError as error:
            self._observe_failure(error, start)
            raise
        self._observe("fetch", start, sum(entry.size for entry in files))
        return local

    def select(self, ref: ArtifactRef, paths: Sequence[str] = ()) -> tuple[Artifact, builtins.list[FileEntry]]:
        """Return an artifact and those of its files, all for no paths; NOT_FOUND for a path it does not have."""
        manifest = self._find(ref)
        files = self._chosen(manifest, paths)
        self._check_manifest(manifest)
        return self._artifact(manifest), files

    def stream(self, ref: ArtifactRef, entry: FileEntry) -> Iterator[bytes]:
        """Read one file of an exact reference in pieces of at most 1 MiB; DATA_LOSS at the latest at its end."""
        start = time.monotonic()
        try:
            yield from self.store.stream(prefix_of(ref.kind, ref.name, ref.version), entry)
        except LoralineError as error:
            self._observe_failure(error, start)
            raise

    def verify(self, ref: ArtifactRef) -> int:
        """Read every file again where it is stored; return the bytes. DATA_LOSS lists the files that differ."""
        start = time.monotonic()
        manifest = self._find(ref)
        try:
            self._check_manifest(manifest)
            problems = self.store.check(_prefix(manifest), manifest.files)
            if problems:
                raise damaged(self.store.location(_prefix(manifest)), problems)
        except LoralineError as error:
            self._observe_failure(error, start)
            raise
        self._observe("verify", start, manifest.size_bytes)
        return manifest.size_bytes

    def delete(self, ref: ArtifactRef, *, force: bool = False) -> None:
        """Delete one version, which the reference must name. FAILED_PRECONDITION names who still needs it.

        `force` deletes it although other artifacts were made from it.
        """
        if check_ref(ref).WhichOneof("selector") != "version":
            message = f"Say which version of {format_ref(ref)} shall be deleted, such as {format_ref(ref)}:v1."
            raise invalid_argument("VERSION_REQUIRED", message, ref__version=message)
        with self.database.begin() as connection:
            found = catalog.find(connection, ref, lock=True)
            check_unused(connection, found, force=force)
            catalog.mark_deleting(connection, found)
        self._purge(catalog.Unfinished(found.kind, found.name, found.version, ()))

    def set_alias(self, ref: ArtifactRef, alias: str, actor: str = "") -> AliasChange:
        """Point an alias at a version, in one transaction with its history."""
        check_ref(ref)
        check_new_alias(alias)
        with self.database.begin() as connection:
            return aliases.move(connection, catalog.find(connection, ref, lock=True), alias, actor)

    def delete_alias(self, kind: int, name: str, alias: str, actor: str = "") -> AliasChange:
        """Remove an alias; its history stays. NOT_FOUND names the aliases there are."""
        check_kind(kind)
        check_name(name)
        with self.database.begin() as connection:
            return aliases.remove(connection, kind, name, alias, actor)

    def alias_changes(
        self, kind: int, name: str, alias: str = "", page_size: int = 50, page_token: str = ""
    ) -> tuple[builtins.list[AliasChange], str]:
        """Return a page of the moves of a name's aliases, newest first, and the token of the next page."""
        with self.database.read() as connection:
            size = catalog.check_page_size(page_size)
            return aliases.page(connection, kind, name, alias, size, page_token)

    def collect_garbage(self, older_than_seconds: float = 3600.0) -> int:
        """Remove what writers that died left behind, if silent for so long; return how many versions that were."""
        with self.database.begin() as connection:
            doomed = catalog.claim_garbage(connection, older_than_seconds)
        for item in doomed:
            self._purge(item)
        self.store.sweep(older_than_seconds)
        sweep_uploads(self.upload_dir, older_than_seconds)
        return len(doomed)

    def _purge(self, item: catalog.Unfinished) -> None:
        self.store.discard(prefix_of(item.kind, item.name, item.version), item.paths)
        with self.database.begin() as connection:
            catalog.drop(connection, item.kind, item.name, item.version)

    def _find(self, ref: ArtifactRef) -> Manifest:
        check_ref(ref)
        with self.database.read() as connection:
            found = catalog.find(connection, ref)
        assert found.manifest is not None, "a ready version has a manifest"  # noqa: S101
        return found.manifest

    def _artifact(self, manifest: Manifest) -> Artifact:
        with self.database.read() as connection:
            pointing = catalog.aliases_at(connection, manifest.kind, manifest.name, manifest.version)
        return manifest.to_artifact(aliases=pointing, location=self.store.location(_prefix(manifest)))

    def _check_manifest(self, manifest: Manifest) -> None:
        """No manifest, no artifact: what the store says must be what the database says."""
        stored = self.store.read_manifest(_prefix(manifest))
        if stored != manifest.to_bytes():
            problem = "is missing" if stored is None else "differs from the database's copy"
            raise damaged(self.store.location(_prefix(manifest)), {"manifest.json": problem})

    @staticmethod
    def _chosen(manifest: Manifest, paths: Sequence[str]) -> builtins.list[FileEntry]:
        if not paths:
            return manifest.files
        known = {entry.path: entry for entry in manifest.files}
        missing = [path for path in paths if path not in known]
        if missing:
            where = f"{_prefix(manifest)} has no file {missing[0]!r}. It has {', '.join(list(known)[:20])}."
            raise not_found("FILE_NOT_FOUND", where, path=missing[0])
        return [known[path] for path in dict.fromkeys(paths)]

    def _observe(self, event: str, start: float, size: int) -> None:
        if self.observer is not None:
            self.observer(event, time.monotonic() - start, size)

    def _observe_failure(self, error: LoralineError, start: float) -> None:
        if error.reason == "ARTIFACT_DAMAGED":
            self._observe("verify_failure", start, 0)


def _prefix(manifest: Manifest) -> str:
    return prefix_of(manifest.kind, manifest.name, manifest.version)
