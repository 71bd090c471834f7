"""One library on each kind of store and database; every test of the contract runs on all of them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from minio import Minio

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_DATASET, Artifact
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.local import LocalStore
from loraline.core.artifacts.refs import prefix_of
from loraline.core.artifacts.s3 import S3Store
from loraline.core.artifacts.s3_client import open_client
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.testing.fixtures import postgres, s3

__all__ = ["postgres", "s3"]

PART = 5 * 1024 * 1024
DATASET = ARTIFACT_KIND_DATASET


@dataclass
class Place:
    """A library and a back door to the bytes behind it."""

    settings: CoreSettings
    database: Database
    tmp: Path
    client: Minio | None = None
    bucket: str = ""
    library: ArtifactLibrary = field(init=False)

    def __post_init__(self) -> None:
        self.library = self.open()

    def open(self) -> ArtifactLibrary:
        """Another library on the same store, as another process would have."""
        if self.client is None:
            return ArtifactLibrary.open(self.settings, self.database)
        store = S3Store(open_client(self.settings), self.bucket, "some/prefix", part_size=PART)
        return ArtifactLibrary(store, self.database, self.settings.data_dir / "cache")

    def folder(self, **files: bytes) -> Path:
        """A folder to publish; `__` in a name is a slash, a trailing `_` is cut."""
        top = self.tmp / f"source-{os.urandom(4).hex()}"
        for name, content in files.items():
            path = top / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return top

    def stored(self) -> dict[str, int]:
        """Every file in the store, finished or not, with its size."""
        if self.client is not None:
            if not self.client.bucket_exists(self.bucket):
                return {}
            found = self.client.list_objects(self.bucket, recursive=True)
            return {str(item.object_name).removeprefix("some/prefix/"): item.size or 0 for item in found}
        root = Path(self.settings.store_url.removeprefix("file://"))
        return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}

    def damage(self, artifact: Artifact, path: str, change: Callable[[bytes], bytes | None]) -> None:
        """Change or (None) remove a stored file behind the library's back."""
        key = f"{prefix_of(artifact.ref.kind, artifact.ref.name, artifact.ref.version)}/{path}"
        if self.client is None:
            file = Path(self.settings.store_url.removeprefix("file://")) / key
            content = change(file.read_bytes())
            file.unlink() if content is None else file.write_bytes(content)
            return
        key = f"some/prefix/{key}"
        content = change(self.client.get_object(self.bucket, key).read())
        self.client.remove_object(self.bucket, key)
        if content is not None:
            self.client.put_object(self.bucket, key, io.BytesIO(content), len(content))


@pytest.fixture(params=["local-sqlite", "s3-sqlite", "s3-postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A fresh library; the parameter names store and database."""
    store, kind = request.param.split("-")
    url = request.getfixturevalue("postgres").new_database() if kind == "postgres" else ""
    fields = {"data_dir": tmp_path / "data", "database_url": url}
    settings = CoreSettings(**fields) if store == "local" else request.getfixturevalue("s3").settings(**fields)
    database = Database(settings.database_url)
    database.migrate()
    if store == "local":
        yield Place(settings, database, tmp_path)
    else:
        bucket = settings.store_url.removeprefix("s3://")
        yield Place(settings, database, tmp_path, open_client(settings), bucket)
    database.close()


@pytest.fixture
def local_place(tmp_path: Path) -> Iterator[Place]:
    """A fresh library on a folder and SQLite, for what has nothing to do with the store."""
    settings = CoreSettings(data_dir=tmp_path / "data")
    database = Database(settings.database_url)
    database.migrate()
    yield Place(settings, database, tmp_path)
    database.close()


def is_s3(place: Place) -> bool:
    """Tell whether the place's store is S3."""
    return not isinstance(place.library.store, LocalStore)
