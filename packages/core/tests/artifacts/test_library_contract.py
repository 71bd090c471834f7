"""What every store and database must do alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER, ARTIFACT_KIND_DATASET, ArtifactRef
from loraline.core.artifacts.refs import parse_ref
from loraline.core.db.schema import artifacts
from loraline.core.errors import LoralineError

DATASET = ARTIFACT_KIND_DATASET
BIG = os.urandom(40 * 1024 * 1024 + 12_345)


def rows(place: Any) -> list[tuple[str, int]]:
    with place.database.read() as connection:
        found = connection.execute(sa.select(artifacts.c.state, artifacts.c.version).order_by(artifacts.c.version))
        return [(row.state, row.version) for row in found]


def flip(content: bytes) -> bytes:
    return content[:5] + bytes([content[5] ^ 1]) + content[6:]


def refused(call: Callable[[], object]) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        call()
    return caught.value


def test_round_trip(place: Any) -> None:
    lineage = place.library.publish(DATASET, "raw", place.folder(a=b"1")).ref
    source = place.folder(a__b__c=b"deep", empty=b"", top=b"x" * 3_000_000)
    seen: list[tuple[int, int]] = []
    made = place.library.publish(
        DATASET, "mareva", source, inputs=[ArtifactRef(kind=DATASET, name="raw")], settings={"rank": 8, "x": [1, None]},
        facts={"rows": 3, "loss": float("nan")}, library_versions={"trl": "1.0"}, job="datagen-1",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (made.ref.name, made.ref.version, made.ref.digest) == ("mareva", 1, made.digest)
    assert [f.path for f in made.files] == ["a/b/c", "empty", "top"]
    assert made.size_bytes == 3_000_004
    assert list(made.inputs) == [lineage]
    assert dict(made.facts) == {"rows": 3, "loss": "nan"}
    assert made.settings["x"][1] is None
    assert seen[-1] == (3_000_004, 3_000_004)
    other = place.open()
    fetched = other.fetch(parse_ref("dataset/mareva"))
    for file in source.rglob("*"):
        if file.is_file():
            assert (fetched / file.relative_to(source)).read_bytes() == file.read_bytes()
    assert other.get(made.ref) == made
    assert other.verify(made.ref) == 3_000_004
    stored = json.loads(next(b for b in [read(place, "datasets/mareva/v1/manifest.json")]))
    assert stored["digest"] == made.digest
    assert stored["inputs"] == [{"ref": "dataset/raw:v1", "digest": lineage.digest}]
    assert stored["files"][0] == {"path": "a/b/c", "size_bytes": 4, "sha256": made.files[0].sha256}


def read(place: Any, key: str) -> bytes:
    prefix, _, name = key.rpartition("/")
    assert name == "manifest.json"
    return place.library.store.read_manifest(prefix)


def test_fetch_of_some_paths(place: Any) -> None:
    made = place.library.publish(DATASET, "d", place.folder(a=b"1", b=b"2"))
    assert (place.library.fetch(made.ref, paths=["b"]) / "b").read_bytes() == b"2"
    error = refused(lambda: place.library.fetch(made.ref, paths=["c"]))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "FILE_NOT_FOUND")


def test_big_file_goes_in_parts(place: Any) -> None:
    made = place.library.publish(DATASET, "big", place.folder(weights=BIG, small=b"1"))
    fetched = place.open().fetch(made.ref)
    assert (fetched / "weights").read_bytes() == BIG
    assert place.library.verify(made.ref) == len(BIG) + 1
    entry = place.library.select(made.ref, ["weights"])[1][0]
    assert b"".join(place.library.stream(made.ref, entry)) == BIG
    assert not list(fetched.glob(".*.partial"))


def test_unicode_names(place: Any) -> None:
    name = unicodedata.normalize("NFC", "résumé 日本語 한국어 #?%&+ .txt")
    source = place.folder()
    (source / "目录").mkdir(parents=True)
    (source / "目录" / name).write_bytes(b"content")
    made = place.library.publish(DATASET, "names", source)
    assert made.files[0].path == f"目录/{name}"
    assert (place.open().fetch(made.ref) / "目录" / name).read_bytes() == b"content"
    place.library.delete(made.ref)
    assert place.stored() == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [(flip, "SHA-256"), (lambda content: content[:-1], "bytes instead of"), (lambda content: None, "is missing")],
    ids=["bit-flip", "truncated", "missing"],
)
def test_damage_is_data_loss_and_named(place: Any, change: Any, words: str) -> None:
    made = place.library.publish(DATASET, "d", place.folder(good=b"0123456789", sub__bad=b"0123456789"))
    place.library.fetch(made.ref)
    place.damage(made, "sub/bad", change)
    fresh = place.open()
    fresh._cache = place.tmp / "cold-cache"
    events: list[str] = []
    fresh.observer = lambda event, seconds, size: events.append(event)
    entry = next(e for e in fresh.select(made.ref)[1] if e.path == "sub/bad")
    for call in (
        lambda: fresh.verify(made.ref),
        lambda: fresh.fetch(made.ref),
        lambda: b"".join(fresh.stream(made.ref, entry)),
    ):
        error = refused(call)
        assert error.code == grpc.StatusCode.DATA_LOSS
        assert "sub/bad" in error.message
        assert error.metadata["files"] == "sub/bad"
    assert words in refused(lambda: fresh.verify(made.ref)).message
    assert set(events) == {"verify_failure"}
    assert not (place.tmp / "cold-cache" / "datasets/d" / f"v1-{made.digest[7:19]}" / "sub/bad").exists()


def test_damage_after_a_fetch_is_found_by_the_next(place: Any) -> None:
    made = place.library.publish(DATASET, "d", place.folder(a=b"0123456789"))
    file = place.library.fetch(made.ref) / "a"
    file.write_bytes(b"0123456780")
    if place.client is None:
        assert refused(lambda: place.library.fetch(made.ref)).code == grpc.StatusCode.DATA_LOSS
    else:  # the store still has it
        assert (place.library.fetch(made.ref) / "a").read_bytes() == b"0123456789"


def test_no_manifest_no_artifact(place: Any) -> None:
    made = place.library.publish(DATASET, "d", place.folder(a=b"1"))
    place.damage(made, "manifest.json", lambda content: None)
    for call in (place.library.fetch, place.library.verify):
        error = refused(lambda call=call: call(made.ref))
        assert error.code == grpc.StatusCode.DATA_LOSS
        assert "manifest.json" in error.message


def test_crash_before_the_manifest_leaves_nothing_visible(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    def crash(prefix: str, manifest: bytes) -> None:
        seen.update(place.stored())
        raise OSError("crash")

    monkeypatch.setattr(place.library.store, "commit", crash)
    monkeypatch.setattr(place.library.store, "discard", lambda *args: (_ for _ in ()).throw(OSError("dead")))
    with pytest.raises(OSError, match="crash"):
        place.library.publish(DATASET, "d", place.folder(a=b"1"))
    assert [name for name in seen if name.endswith("/a")]  # the bytes were there,
    assert not [name for name in seen if "manifest" in name]
    other = place.open()
    assert other.list() == ([], "")
    assert refused(lambda: other.resolve(parse_ref("dataset/d"))).code == grpc.StatusCode.NOT_FOUND
    assert other.collect_garbage(3600) == 0  # a writer so young may be alive
    assert rows(place) == [("pending", 1)]
    assert other.collect_garbage(0) == 1
    assert (rows(place), place.stored()) == ([], {})
    assert other.publish(DATASET, "d", place.folder(a=b"1")).ref.version == 2


def test_failed_publish_leaves_nothing_and_no_gap(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place.library.store, "commit", lambda *args: (_ for _ in ()).throw(OSError("crash")))
        with pytest.raises(OSError, match="crash"):
            place.library.publish(DATASET, "d", place.folder(a=b"1", big=BIG))
    assert (rows(place), place.stored()) == ([], {})
    assert place.library.publish(DATASET, "d", place.folder(a=b"1")).ref.version == 1


def test_equal_content_gives_the_version_back(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place.folder(a=b"1" * 100, b=b"2" * 100)
    first = place.library.publish(DATASET, "d", source)
    monkeypatch.setattr(place.library.store, "write", lambda *args: pytest.fail("bytes were moved"))
    events: list[str] = []
    other = place.library
    other.observer = lambda event, seconds, size: events.append(event)
    again = other.publish_folder(DATASET, "d", source, settings={"other": True})
    assert (again.artifact, again.unchanged) == (first, True)
    assert events == ["publish_unchanged"]
    monkeypatch.undo()
    place.damage(first, "a", lambda content: content[:-1])
    assert place.open().publish(DATASET, "d", source).ref.version == 2  # a visibly damaged version is replaced


def test_unchanged_files_are_copied_inside_the_store(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place.folder(big=BIG, card=b"one")
    place.library.publish(DATASET, "d", source)
    (source / "card").write_bytes(b"two!")
    (source / "big").rename(source / "renamed")
    moved: list[int] = []
    write = place.library.store.write
    monkeypatch.setattr(place.library.store, "write", lambda prefix, files, advance: write(prefix, files, moved.append))
    second = place.library.publish(DATASET, "d", source)
    assert moved == [4]
    assert (place.open().fetch(second.ref) / "renamed").read_bytes() == BIG
    place.library.delete(ArtifactRef(kind=DATASET, name="d", version=1))
    assert place.open().verify(second.ref) == len(BIG) + 4


def test_a_changed_file_of_equal_size_is_hashed_once(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place.folder(big=BIG, card=b"one")
    place.library.publish(DATASET, "d", source)
    (source / "big").write_bytes(flip(BIG))
    (source / "card").write_bytes(b"two")
    planned: list[Any] = []
    write = place.library.store.write

    def watched(prefix: str, files: Any, advance: Any) -> Any:
        planned.extend(files)
        return write(prefix, files, advance)

    monkeypatch.setattr(place.library.store, "write", watched)
    second = place.library.publish(DATASET, "d", source)
    assert all(type(item.hasher()).__name__ == "_Known" for item in planned)  # nothing takes the bytes again
    assert place.open().verify(second.ref) == len(BIG) + 3

    def late(prefix: str, files: Any, advance: Any) -> Any:
        (source / "card").write_bytes(b"4444")
        (source / "card").write_bytes(b"for")
        return write(prefix, files, advance)

    (source / "card").write_bytes(b"thr")
    monkeypatch.setattr(place.library.store, "write", late)
    assert refused(lambda: place.library.publish(DATASET, "d", source)).reason == "SOURCE_CHANGED"


def test_guard_that_refuses(place: Any) -> None:
    calls: list[int] = []

    def refuse_at(number: int) -> Callable[[sa.Connection], None]:
        def guard(connection: sa.Connection) -> None:
            assert connection.in_transaction()
            calls.append(number)
            if calls.count(number) == number:
                raise LoralineError(grpc.StatusCode.ABORTED, "LEASE_LOST", "another took over")

        return guard

    for number in (1, 2):
        error = refused(lambda n=number: place.library.publish(DATASET, "d", place.folder(a=b"1"), guard=refuse_at(n)))
        assert error.reason == "LEASE_LOST"
        assert (rows(place), place.stored()) == ([], {})
    assert calls == [1, 2, 2]
    made = place.library.publish(DATASET, "d", place.folder(a=b"1"), guard=refuse_at(9))
    assert made.ref.version == 1


def test_a_later_attempt_of_the_same_job_takes_over(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library, late = place.library, place.open()
    write = late.store.write

    def write_late(prefix: str, files: Any, advance: Any) -> Any:
        assert library.publish(DATASET, "d", place.folder(a=b"second"), job="job-1").ref.version == 2
        return write(prefix, files, advance)

    monkeypatch.setattr(late.store, "write", write_late)
    error = refused(lambda: late.publish(DATASET, "d", place.folder(a=b"first"), job="job-1"))
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "PUBLISH_SUPERSEDED")
    assert rows(place) == [("ready", 2)]
    assert {name.split("/")[2] for name in place.stored()} == {"v2"}
    assert library.verify(parse_ref("dataset/d")) == 6


def test_concurrent_writers_never_share_a_version(place: Any) -> None:
    libraries = [place.open() for _ in range(4)]
    start = threading.Barrier(4)

    def publish(number: int) -> list[tuple[int, str]]:
        start.wait()
        found = []
        for turn in range(3):
            made = libraries[number].publish(DATASET, "d", place.folder(a=f"{number}-{turn}".encode()))
            found.append((made.ref.version, made.digest))
        return found

    with ThreadPoolExecutor(4) as pool:
        made = [pair for pairs in pool.map(publish, range(4)) for pair in pairs]
    assert sorted(version for version, _ in made) == list(range(1, 13))
    for version, digest in made:
        assert place.library.get(ArtifactRef(kind=DATASET, name="d", version=version)).digest == digest
        place.library.verify(ArtifactRef(kind=DATASET, name="d", version=version))


def test_source_that_changes_while_it_is_read(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place.folder(a=b"1" * 100)
    write = place.library.store.write

    def grow(prefix: str, files: Any, advance: Any) -> Any:
        (source / "a").write_bytes(b"1" * 101)
        return write(prefix, files, advance)

    monkeypatch.setattr(place.library.store, "write", grow)
    error = refused(lambda: place.library.publish(DATASET, "d", source))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SOURCE_CHANGED")
    assert (rows(place), place.stored()) == ([], {})


def test_aliases_and_their_history(place: Any) -> None:
    library = place.library
    one = library.publish(DATASET, "d", place.folder(a=b"1")).ref
    two = library.publish(DATASET, "d", place.folder(a=b"2")).ref
    assert library.set_alias(one, "production", "ann").from_version == 0
    moved = library.set_alias(two, "production", "bob")
    assert (moved.from_version, moved.to_version, moved.actor) == (1, 2, "bob")
    library.set_alias(parse_ref("dataset/d@production"), "stable", "ann")
    assert library.resolve(parse_ref("dataset/d@production")) == two
    assert list(library.get(two).aliases) == ["production", "stable"]
    assert list(library.get(one).aliases) == []
    error = refused(lambda: library.delete(two))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ARTIFACT_ALIASED")
    assert "@production" in error.message
    assert "loraline artifacts alias dataset/d:v2 production --delete" in error.message
    assert library.delete_alias(DATASET, "d", "production", "cat").to_version == 0
    assert refused(lambda: library.delete_alias(DATASET, "d", "production")).reason == "ALIAS_NOT_FOUND"
    first, token = library.alias_changes(DATASET, "d", page_size=3)
    rest, end = library.alias_changes(DATASET, "d", page_size=3, page_token=token)
    assert [(c.alias, c.from_version, c.to_version) for c in [*first, *rest]] == [
        ("production", 2, 0), ("stable", 0, 2), ("production", 1, 2), ("production", 0, 1),
    ]  # fmt: skip
    assert end == ""
    assert [c.alias for c in library.alias_changes(DATASET, "d", "stable")[0]] == ["stable"]
    library.delete_alias(DATASET, "d", "stable")
    library.delete(two)
    assert library.resolve(parse_ref("dataset/d")) == one


def test_delete_and_alias_at_the_same_time(place: Any) -> None:
    """Whoever comes first wins: an alias never points at a deleted version."""
    for turn in range(5):
        ref = place.library.publish(DATASET, "d", place.folder(a=str(turn).encode())).ref
        start = threading.Barrier(2)

        def attempt(call: Callable[[], object], start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                call()
            except LoralineError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            deleted = pool.submit(attempt, lambda ref=ref: place.library.delete(ref))
            aliased = pool.submit(attempt, lambda ref=ref: place.library.set_alias(ref, "a"))
        assert deleted.result() != aliased.result()
        if aliased.result():
            assert place.library.resolve(parse_ref("dataset/d@a")) == ref
            place.library.delete_alias(DATASET, "d", "a")


def test_versions_are_never_used_twice(place: Any) -> None:
    ref = place.library.publish(DATASET, "d", place.folder(a=b"1")).ref
    place.library.delete(ref)
    assert place.stored() == {}
    assert place.library.publish(DATASET, "d", place.folder(a=b"1")).ref.version == 2


def test_paging_newest_first(place: Any) -> None:
    for number in range(5):
        place.library.publish(DATASET, f"d{number % 2}", place.folder(a=str(number).encode()))
    place.library.publish(ARTIFACT_KIND_ADAPTER, "d0", place.folder(a=b"x"))
    found, token, pages = [], "", 0
    while True:
        page, token = place.library.list(kind=DATASET, page_size=2, page_token=token)
        found += [(a.ref.name, a.ref.version) for a in page]
        pages += 1
        if not token:
            break
    assert (found, pages) == ([("d0", 3), ("d1", 2), ("d0", 2), ("d1", 1), ("d0", 1)], 3)
    assert [a.ref.version for a in place.library.list(kind=DATASET, name="d1")[0]] == [2, 1]
    assert not place.library.list()[0][0].files
    _, token = place.library.list(kind=DATASET, page_size=2)
    for bad in (token[:-4], "x", token + "=="):
        call = lambda bad=bad: place.library.list(kind=ARTIFACT_KIND_ADAPTER, page_size=2, page_token=bad)  # noqa: E731
        assert refused(call).reason == "PAGE_TOKEN_INVALID"


def test_not_found_names_what_exists(place: Any) -> None:
    ref = place.library.publish(DATASET, "mareva", place.folder(a=b"1")).ref
    place.library.set_alias(ref, "production")
    for text, words in (
        ("dataset/mareva:v7", ["v1", "@production"]),
        ("dataset/mareva@staging", ["v1", "@production"]),
        ("dataset/marewa", ["mareva"]),
        ("adapter/mareva", ["no adapter"]),
    ):
        error = refused(lambda text=text: place.library.fetch(parse_ref(text)))
        assert error.code == grpc.StatusCode.NOT_FOUND
        assert all(word in error.message for word in [*words, text])
    ref.digest = "sha256:" + "0" * 64
    assert refused(lambda: place.library.get(ref)).code == grpc.StatusCode.DATA_LOSS


@pytest.mark.slow
def test_writers_in_several_processes(place: Any) -> None:
    """Four processes publish at once; none shares a version, none fails."""
    script = Path(__file__).with_name("publish_some.py")
    environment = {
        **os.environ,
        "LORALINE_DATA_DIR": str(place.settings.data_dir),
        "LORALINE_DATABASE_URL": place.settings.database_url,
        "LORALINE_STORE_URL": place.settings.store_url + ("/some/prefix" if place.client else ""),
        "LORALINE_S3_ENDPOINT": place.settings.s3_endpoint,
        "LORALINE_S3_ACCESS_KEY": place.settings.s3_access_key,
        "LORALINE_S3_SECRET_KEY": place.settings.s3_secret_key.get_secret_value(),
    }
    running = [
        subprocess.Popen([sys.executable, str(script), str(number)], env=environment, stdout=subprocess.PIPE)
        for number in range(4)
    ]
    said = [process.communicate(timeout=120)[0].decode().split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sorted(int(version) for versions in said for version in versions) == list(range(1, 13))
