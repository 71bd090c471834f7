"""What may not become an artifact, and what a full or unreachable store says."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_DATASET, ARTIFACT_KIND_SOURCE, UploadHeader
from loraline.core.artifacts import local, s3_transfer
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.manifest import check_path
from loraline.core.artifacts.refs import format_ref, parse_ref
from loraline.core.artifacts.s3 import S3Store
from loraline.core.artifacts.s3_client import open_client
from loraline.core.artifacts.uploads import Upload
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.db.schema import artifacts
from loraline.core.errors import LoralineError
from loraline.core.testing.servers import S3Server

DATASET, SOURCE = ARTIFACT_KIND_DATASET, ARTIFACT_KIND_SOURCE


def refused(call: Callable[[], object]) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("text", ["adapter/mareva:v3", "adapter/mareva@production", "dataset/a.b-c_d", "report/0:v1"])
def test_references_are_read_and_written(text: str) -> None:
    assert format_ref(parse_ref(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "adapter", "adapter/", "adapter/A", "adapter/a:3", "adapter/a:v0", "adapter/a:v-1", "adapter/a@",
     "adapter/../a", "lora/a", "adapter/a:v1@b", "adapter/a b", "adapter/" + "a" * 65,
     "adapter/a:v" + "9" * 30, "adapter/a\n/b"],
)  # fmt: skip
def test_broken_references_are_refused(text: str) -> None:
    assert refused(lambda: parse_ref(text)).code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../a", "a/../../b", "a/./b", "a//b", "a/", ".", "..", "a\0b", "a\\b", "..\\a", "C:/a", "a\nb",
     "a\x7f", "x" * 513, "x" * 256, "\udcff", "manifest.json"],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    assert refused(lambda: check_path(path)).code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", ["a", "a/b.c", "...", "..a", "日本語/é", "sub/manifest.json", "a b#?%&+"])
def test_ordinary_paths_pass(path: str) -> None:
    assert check_path(path) == path


def test_links_and_special_files_are_refused(local_place: Any) -> None:
    secret = local_place.tmp / "secret"
    secret.write_bytes(b"secret")
    for make in (
        lambda p: p.symlink_to(secret),
        lambda p: p.symlink_to(local_place.tmp, target_is_directory=True),
        lambda p: p.symlink_to("nowhere"),
        os.mkfifo,
    ):
        source = local_place.folder(a=b"1")
        make(source / "odd")
        error = refused(lambda source=source: local_place.library.publish(DATASET, "d", source))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FILE_NOT_REGULAR")
        assert "'odd'" in error.message
    empty = local_place.tmp / "empty"
    (empty / "sub").mkdir(parents=True)
    assert refused(lambda: local_place.library.publish(DATASET, "d", empty)).reason == "FOLDER_EMPTY"
    assert refused(lambda: local_place.library.publish(DATASET, "d", secret)).reason == "FOLDER_INVALID"
    assert refused(lambda: local_place.library.publish(0, "d", secret)).reason == "KIND_INVALID"
    assert refused(lambda: local_place.library.publish(DATASET, "../d", secret)).reason == "NAME_INVALID"
    assert local_place.stored() == {}


def test_a_damaged_file_does_not_live_on_as_a_hard_link(local_place: Any) -> None:
    source = local_place.folder(same=b"0123456789", other=b"1")
    first = local_place.library.publish(DATASET, "d", source)
    local_place.damage(first, "same", lambda content: b"012345678X")
    (source / "other").write_bytes(b"22")
    second = local_place.library.publish(DATASET, "d", source)
    assert local_place.library.verify(second.ref) == 12
    source_inode = (source / "same").stat().st_ino
    assert (local_place.library.fetch(second.ref) / "same").stat().st_ino != source_inode  # callers may write theirs


def test_full_disk_while_writing(local_place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local, "_copy", full)
        error = refused(lambda: local_place.library.publish(DATASET, "d", local_place.folder(a=b"1")))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert "store" in error.metadata["folder"]
    assert local_place.stored() == {}
    with local_place.database.read() as connection:
        assert connection.execute(sa.select(artifacts)).all() == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; making one takes root."""
    place = tmp_path / "tiny"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_that_is_really_full(tiny_disk: Path, local_place: Any) -> None:
    settings = CoreSettings(data_dir=local_place.tmp / "data", store_url=f"file://{tiny_disk}/store")
    library = ArtifactLibrary.open(settings, local_place.database)
    kept = library.publish(DATASET, "d", local_place.folder(a=b"1" * 500_000))
    error = refused(lambda: library.publish(DATASET, "d", local_place.folder(a=b"2" * 1_000_000, b=b"3" * 1_000_000)))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert str(tiny_disk) in error.message
    left = [p for p in tiny_disk.rglob("*") if p.is_file()]
    assert sorted(p.name for p in left) == ["a", "manifest.json"]
    assert library.verify(kept.ref) == 500_000
    assert [a.ref.version for a in library.list()[0]] == [1]
    assert library.publish(DATASET, "d", local_place.folder(a=b"2")).ref.version == 2


def test_store_without_rights_or_out_of_reach(s3: S3Server, local_place: Any) -> None:
    source = local_place.folder(a=b"1")
    for change, code, reason in (
        ({"s3_secret_key": SecretStr("wrong")}, grpc.StatusCode.PERMISSION_DENIED, "STORE_ACCESS_DENIED"),
        ({"s3_access_key": "nobody"}, grpc.StatusCode.PERMISSION_DENIED, "STORE_ACCESS_DENIED"),
        ({"s3_endpoint": "127.0.0.1:9"}, grpc.StatusCode.UNAVAILABLE, "STORE_UNREACHABLE"),
        ({"s3_endpoint": "http://x/y"}, grpc.StatusCode.INVALID_ARGUMENT, "STORE_SETTINGS_INVALID"),
        ({"s3_secret_key": SecretStr("")}, grpc.StatusCode.INVALID_ARGUMENT, "STORE_SETTINGS_INVALID"),
        ({"s3_secret_key_file": Path("/nowhere")}, grpc.StatusCode.INVALID_ARGUMENT, "STORE_SETTINGS_INVALID"),
        ({"store_url": "ftp://x"}, grpc.StatusCode.INVALID_ARGUMENT, "STORE_URL_INVALID"),
    ):
        settings = s3.settings(data_dir=local_place.tmp / "data").model_copy(update=change)

        def publish(settings: CoreSettings = settings) -> object:
            return ArtifactLibrary.open(settings, local_place.database).publish(DATASET, "d", source)

        error = refused(publish)
        assert (error.code, error.reason) == (code, reason), error
        assert "LORALINE_" in error.message or error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert s3.secret_key not in error.message
    assert local_place.library.list() == ([], "")


def test_uploads_refuse_paths_and_clean_up(local_place: Any) -> None:
    parent = local_place.library.upload_dir

    def upload(*chunks: tuple[str, bytes]) -> Any:
        running = Upload(parent, UploadHeader(kind=SOURCE, name="up"))
        try:
            for path, data in chunks:
                running.add(path, data)
            return running.publish(local_place.library)
        finally:
            running.discard()

    made = upload(("a/b", b"1"), ("a/b", b"2"), ("empty", b""))
    assert [(f.path, f.size_bytes) for f in made.artifact.files] == [("a/b", 2), ("empty", 0)]
    assert upload(("a/b", b"12"), ("empty", b"")).unchanged
    for chunks, reason in (
        ([("../x", b"1")], "PATH_INVALID"),
        ([("/x", b"1")], "PATH_INVALID"),
        ([("a", b"1"), ("b", b"1"), ("a", b"1")], "UPLOAD_OUT_OF_ORDER"),
        ([("a", b"1"), ("a/b", b"1")], "PATH_CONFLICT"),
        ([("a/b", b"1"), ("a", b"1")], "PATH_CONFLICT"),
        ([], "FOLDER_EMPTY"),
    ):
        assert refused(lambda chunks=chunks: upload(*chunks)).reason == reason
    assert list(parent.iterdir()) == []
    abandoned = Upload(parent, UploadHeader(kind=SOURCE, name="up"))
    abandoned.add("a", b"1")
    local_place.library.collect_garbage(3600)
    assert len(list(parent.iterdir())) == 1
    local_place.library.collect_garbage(-1)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("url", ["", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "nonsense"])
def test_databases_that_are_not_served(url: str) -> None:
    assert refused(lambda: Database(url)).reason == "DATABASE_URL_INVALID"


def test_database_out_of_reach_keeps_the_password_secret() -> None:
    database = Database("postgresql://ann:s3cret@127.0.0.1:9/db")
    error = refused(database.migrate)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNREACHABLE")
    assert "s3cret" not in error.message
    database.close()


class _SlowHash:
    """SHA-256 on a processor that is busy elsewhere: other threads overtake it between its calls."""

    def __init__(self) -> None:
        self._inner = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        time.sleep(0.4)
        self._inner.update(data)

    def hexdigest(self) -> str:
        return self._inner.hexdigest()


def test_a_part_is_hashed_before_its_buffer_is_used_again(
    s3: S3Server, local_place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = s3.settings(data_dir=local_place.tmp / "data")
    store = S3Store(open_client(settings), settings.store_url.removeprefix("s3://"), part_size=5 * 2**20, concurrency=2)
    library = ArtifactLibrary(store, local_place.database, local_place.tmp / "cache")
    source = local_place.folder(**{name: os.urandom(12 * 2**20) for name in "abc"})
    give = store._buffers.give

    def give_spoiled(buffer: mmap) -> None:
        buffer[:] = bytes(len(buffer))
        give(buffer)

    with monkeypatch.context() as patch:
        patch.setattr(store._buffers, "give", give_spoiled)
        patch.setattr(s3_transfer, "hashlib", SimpleNamespace(sha256=_SlowHash))
        made = library.publish(DATASET, "d", source)
        folder = library.fetch(made.ref)
    for file in made.files:
        assert file.sha256 == hashlib.sha256((source / file.path).read_bytes()).hexdigest()
        assert (folder / file.path).read_bytes() == (source / file.path).read_bytes()
    assert library.verify(made.ref) == 36 * 2**20
